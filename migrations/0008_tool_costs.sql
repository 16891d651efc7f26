-- A call of a tool that has a price has a usage row like a call of a model: what the rows of a tenant sum to is what its budget settled.

-- Up Migration

alter table llm_usage_events
  drop constraint llm_usage_events_purpose_check,
  -- What was paid for: an answer of the agent, a judgement for one of its guardrails, or a call of a tool (`model` is tool/{name} then).
  add constraint llm_usage_events_purpose_check check (purpose in ('answer', 'guardrail', 'tool'));

-- Down Migration

delete from llm_usage_events where purpose = 'tool';
alter table llm_usage_events
  drop constraint llm_usage_events_purpose_check,
  add constraint llm_usage_events_purpose_check check (purpose in ('answer', 'guardrail'));
