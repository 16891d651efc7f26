-- At which model providers a tenant has a key of its own. A call that was lost with its worker left no word of whose key it was made with; it is the
-- tenant's where the tenant had one. Names alone: what is sealed rests in the tenant's journal.

-- Up Migration

-- Nobody had one before, so what was projected stays.
alter table tenants add column own_keys text[] not null default '{}';

-- Down Migration

alter table tenants drop column own_keys;
