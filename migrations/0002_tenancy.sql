-- Who may see and write which rows, enforced beneath our own queries; and the audit as a chain.
--
-- Roles (of the whole server, so they may be there already; without a login until somebody gives them a password):
--   troupe_app        gateways and readers: one tenant at a time, named by the transaction's setting `troupe.tenant`; reads only
--   troupe_projector  the projector: writes every tenant's rows; of the audit it may only add
--   troupe_operator   operators: reads every tenant's rows
--
-- Rules for every table here and after, held by a test of the schema:
--   M5. A table with a column `tenant` is given to `protect_tenant_table`: row-level security, forced on its owner too.
--   M6. No setting, an empty one, or one that names nobody shows no row: a tenant is at least one character, and null equals nothing.
--   M7. None of the roles may change or remove a row of the audit.

-- Up Migration

do $$
declare wanted text;
begin
  foreach wanted in array array['troupe_app', 'troupe_projector', 'troupe_operator'] loop
    begin
      execute format('create role %I nologin nosuperuser nobypassrls nocreatedb nocreaterole noinherit noreplication', wanted);
    exception
      -- Another database of the same server has made it, perhaps at this moment.
      when duplicate_object or unique_violation then null;
    end;
  end loop;
end $$;

grant usage on schema public to troupe_app, troupe_projector, troupe_operator;

create function protect_tenant_table(of regclass) returns void language plpgsql as $$
begin
  execute format('alter table %s enable row level security', of);
  execute format('alter table %s force row level security', of);
  execute format('create policy own_tenant on %s for select to troupe_app using (tenant = nullif(current_setting(''troupe.tenant'', true), ''''))', of);
  execute format('create policy every_tenant on %s for all to troupe_projector using (true) with check (true)', of);
  execute format('create policy looked_at on %s for select to troupe_operator using (true)', of);
  execute format('grant select on %s to troupe_app, troupe_operator', of);
  execute format('grant select, insert, update, delete on %s to troupe_projector', of);
end $$;
revoke execute on function protect_tenant_table(regclass) from public;

-- Where each tenant's chain ends. Kept beside the rows, so that rows taken from the end are missed.
create table audit_heads (
  tenant           text collate "C" primary key,
  rows             bigint not null check (rows > 0),
  stream_sequence  bigint not null,
  chain            text not null check (length(chain) = 64)
);

-- What was projected before has no chain: it is thrown away and made again from the stream.
truncate tenants, keys, agents, sessions, audit, llm_usage_events;
update projection_positions set position = 0, incarnation = null, updated_at = now();

-- SHA-256 of the tenant's previous row's chain and this row's canonical text, in hex.
alter table audit add column chain text not null check (length(chain) = 64);

select protect_tenant_table('tenants'), protect_tenant_table('keys'), protect_tenant_table('agents'), protect_tenant_table('sessions'),
  protect_tenant_table('audit'), protect_tenant_table('audit_heads'), protect_tenant_table('llm_usage_events');

-- Hashes of keys are no reader's business.
revoke select on keys from troupe_app;
-- M7
revoke update, delete on audit from troupe_projector;

-- No tenant's, so every reader may see how far the tables are.
grant select on projection_positions, schema_migrations to troupe_app, troupe_operator;
grant select, insert, update on projection_positions to troupe_projector;

-- Down Migration

drop table audit_heads;
alter table audit drop column chain;
drop policy own_tenant on tenants; drop policy every_tenant on tenants; drop policy looked_at on tenants;
drop policy own_tenant on keys; drop policy every_tenant on keys; drop policy looked_at on keys;
drop policy own_tenant on agents; drop policy every_tenant on agents; drop policy looked_at on agents;
drop policy own_tenant on sessions; drop policy every_tenant on sessions; drop policy looked_at on sessions;
drop policy own_tenant on audit; drop policy every_tenant on audit; drop policy looked_at on audit;
drop policy own_tenant on llm_usage_events; drop policy every_tenant on llm_usage_events; drop policy looked_at on llm_usage_events;
alter table tenants no force row level security; alter table tenants disable row level security;
alter table keys no force row level security; alter table keys disable row level security;
alter table agents no force row level security; alter table agents disable row level security;
alter table sessions no force row level security; alter table sessions disable row level security;
alter table audit no force row level security; alter table audit disable row level security;
alter table llm_usage_events no force row level security; alter table llm_usage_events disable row level security;
drop function protect_tenant_table(regclass);
revoke all on tenants, keys, agents, sessions, audit, llm_usage_events, projection_positions, schema_migrations from troupe_app, troupe_projector, troupe_operator;
revoke usage on schema public from troupe_app, troupe_projector, troupe_operator;
