-- Each call of a model has its own usage row: one that was tried again or fell back to another model leaves a row per try, and so does a call that
-- a guardrail made to have a text judged. What the rows of an attempt cost together is what the budget settled for it.

-- Up Migration

-- What was projected before has one row per attempt: it is thrown away and made again from the stream.
truncate tenants, keys, agents, sessions, audit, audit_heads, llm_usage_events;
update projection_positions set position = 0, incarnation = null, updated_at = now();

alter table llm_usage_events
  -- Counts the calls of one attempt, from 1, in the order in which they were made.
  add column try integer not null check (try > 0),
  -- What the call was for: an answer of the agent, or a judgement for one of its guardrails.
  add column purpose text not null check (purpose in ('answer', 'guardrail')),
  -- Of a guardrail: its name.
  add column rule text,
  -- To the first piece of the answer; null when there was none, or nobody measured it.
  add column first_token_ms integer,
  drop constraint llm_usage_events_pkey,
  add primary key (tenant, session, inst, attempt, try);

drop index llm_usage_newest;
create index llm_usage_newest on llm_usage_events (tenant, stream_sequence desc, inst desc, attempt desc, try desc);

-- Down Migration

-- An attempt of several rows has no place in the table as it was.
truncate tenants, keys, agents, sessions, audit, audit_heads, llm_usage_events;
update projection_positions set position = 0, incarnation = null, updated_at = now();

drop index llm_usage_newest;
alter table llm_usage_events
  drop constraint llm_usage_events_pkey,
  drop column try,
  drop column purpose,
  drop column rule,
  drop column first_token_ms,
  add primary key (tenant, session, inst, attempt);
create index llm_usage_newest on llm_usage_events (tenant, stream_sequence desc, inst desc, attempt desc);
