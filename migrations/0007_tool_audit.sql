-- Each tool that a model called has two rows in the audit: `tool.intent`, from the commit that let the call begin, and `tool.outcome`, from the one
-- that ended it (projections/tool-audit.ts). They stand after the rows of their message's entries: `entry_index` counts on.

-- Up Migration

alter table audit
  add column tool text,
  -- SHA-256 of the arguments' and the result's canonical JSON, in hex; M3 leaves no more of them.
  add column args_hash text check (length(args_hash) = 64),
  add column result_hash text check (length(result_hash) = 64),
  add column decision text check (decision in ('allowed', 'denied', 'unknown')),
  add column duration_ms bigint,
  add column cost_usd_micros bigint,
  add column attempts integer;
create index audit_by_tool on audit (tenant, tool, stream_sequence desc, entry_index desc) where tool is not null;
-- Calls of tools in flight: their outcome's row is written when they end.
alter table sessions add column open_tools jsonb not null default '[]';

-- What was projected before has no rows of tools: it is thrown away and made again from the stream. A tenant none of whose sessions called a tool
-- keeps the chain that it had.
truncate tenants, keys, agents, sessions, audit, audit_heads, llm_usage_events;
update projection_positions set position = 0, incarnation = null, updated_at = now();

-- Down Migration

-- Without their columns the rows of tools mean nothing.
truncate tenants, keys, agents, sessions, audit, audit_heads, llm_usage_events;
update projection_positions set position = 0, incarnation = null, updated_at = now();

alter table sessions drop column open_tools;
drop index audit_by_tool;
alter table audit
  drop column tool,
  drop column args_hash,
  drop column result_hash,
  drop column decision,
  drop column duration_ms,
  drop column cost_usd_micros,
  drop column attempts;
