-- What people configured and what they query, projected from EVENTS. Every row can be thrown away and made again from the streams.
--
-- Rules for every table here and after:
--   M1. A table that holds a tenant's rows has `tenant` as the first column of its primary key, so that row-level security can be
--       forced on it and every index scan is bounded by one tenant.
--   M2. Ids sort by bytes (collate "C"): an order that no locale and no upgrade of ICU changes, since pages continue by it.
--   M3. Nothing here bears what a customer wrote to an agent or an agent answered; the streams hold that, the audit row its hash.
--   M4. Times have milliseconds, as on the wire. Money is integer micro-dollars. Unknown is null, never 0.

-- Up Migration

-- How far each projector has read; written in the same transaction as the rows it made.
create table projection_positions (
  name         text collate "C" primary key,
  stream       text not null,
  -- The stream's creation time, as the bus tells it; null before the first message of a fresh or rebuilt projection.
  incarnation  text,
  position     bigint not null default 0 check (position >= 0),
  updated_at   timestamptz not null default now()
);

create table tenants (
  tenant           text collate "C" primary key,
  name             text,
  state            text not null,
  created_at       timestamptz(3) not null,
  updated_at       timestamptz(3) not null,
  seq              bigint not null,
  stream_sequence  bigint not null
);

-- Hashes only: a key is shown once, to whoever made it.
create table keys (
  tenant      text collate "C" not null,
  key_id      text collate "C" not null,
  hash        text not null,
  scopes      text[] not null,
  label       text,
  created_at  timestamptz(3) not null,
  revoked_at  timestamptz(3),
  primary key (tenant, key_id)
);

-- One row per version; sessions are pinned to the one they were created with.
create table agents (
  tenant      text collate "C" not null,
  agent       text collate "C" not null,
  version     integer not null,
  hash        text not null,
  config      jsonb not null,
  created_at  timestamptz(3) not null,
  primary key (tenant, agent, version)
);

create table sessions (
  tenant           text collate "C" not null,
  session          text collate "C" not null,
  agent            text collate "C" not null,
  agent_version    integer,
  config_hash      text,
  external_id      text,
  user_id          text,
  mode             text,
  metadata         jsonb not null,
  model            text,
  state            text not null,
  reason           text,
  turn             integer not null,
  created_at       timestamptz(3) not null,
  updated_at       timestamptz(3) not null,
  seq              bigint not null,
  epoch            bigint not null,
  worker           text not null,
  machine          text not null,
  stream_sequence  bigint not null,
  -- The model call in flight: {inst, turn, step, attempt, model, started_at}. Its usage row is written when it ends.
  open_call        jsonb,
  primary key (tenant, session)
);
create index sessions_newest on sessions (tenant, created_at desc, session desc);
create index sessions_by_state on sessions (tenant, state, created_at desc, session desc);
create index sessions_by_agent on sessions (tenant, agent, created_at desc, session desc);

-- One row per journal entry, also of refused commands. Events and the state after belong to the commit, so they stand in the row of
-- its last entry.
create table audit (
  tenant           text collate "C" not null,
  kind             text collate "C" not null,
  actor            text collate "C" not null,
  stream_sequence  bigint not null,
  entry_index      integer not null,
  seq              bigint not null,
  at               timestamptz(3) not null,
  epoch            bigint not null,
  worker           text not null,
  machine          text not null,
  entry_type       text not null,
  command_type     text,
  channel          text,
  key              text,
  source           jsonb,
  inst             text,
  -- Of a refused command or a failed effect.
  code             text,
  state_after      text,
  -- Types only.
  events           jsonb not null,
  trace            text,
  -- SHA-256 of the entry's canonical JSON, in hex.
  hash             text not null check (length(hash) = 64),
  primary key (tenant, kind, actor, stream_sequence, entry_index)
);
create index audit_newest on audit (tenant, stream_sequence desc, entry_index desc);

-- One row per attempt of a model call, also of those that failed, were cancelled, or were lost with their worker.
create table llm_usage_events (
  tenant              text collate "C" not null,
  session             text collate "C" not null,
  inst                text collate "C" not null,
  attempt             integer not null,
  turn                integer not null,
  step                integer not null,
  agent               text collate "C" not null,
  user_id             text,
  model               text not null,
  provider            text not null,
  key_source          text not null check (key_source in ('platform', 'tenant')),
  input_tokens        bigint,
  output_tokens       bigint,
  cache_read_tokens   bigint,
  cache_write_tokens  bigint,
  reasoning_tokens    bigint,
  cost_usd_micros     bigint,
  price_version       text,
  -- The provider did not say; the counts are ours.
  estimated           boolean not null,
  outcome             text not null check (outcome in ('completed', 'failed', 'cancelled', 'superseded')),
  code                text,
  started_at          timestamptz(3) not null,
  ended_at            timestamptz(3) not null,
  -- Of the message that ended it.
  stream_sequence     bigint not null,
  primary key (tenant, session, inst, attempt)
);
create index llm_usage_newest on llm_usage_events (tenant, stream_sequence desc, inst desc, attempt desc);
create index llm_usage_by_agent on llm_usage_events (tenant, agent, ended_at);

-- Down Migration

drop table llm_usage_events;
drop table audit;
drop table sessions;
drop table agents;
drop table keys;
drop table tenants;
drop table projection_positions;
