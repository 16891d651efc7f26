-- Who said a command, in the audit: `key:{id}`, `jwt:{subject}`, `nats`, `login:{user}`; null for the runtime itself and for entries from before it was noted.
-- A row without one has the chain it always had: the chain is computed over what is there (audit-chain.ts).

-- Up Migration

alter table audit add column principal text;
create index audit_by_principal on audit (tenant, principal, stream_sequence desc, entry_index desc) where principal is not null;

-- Down Migration

drop index audit_by_principal;
alter table audit drop column principal;
