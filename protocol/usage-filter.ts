// usage-filter: which calls of a tenant's models somebody asks about: all of them, or those of an agent, a user, a session, a model, a time.
export interface UsageFilter {
  readonly session?: string | undefined;
  readonly agent?: string | undefined;
  readonly user?: string | undefined;
  readonly model?: string | undefined;
  /** RFC 3339; by the end of the attempt, `since` included, `until` not. */
  readonly since?: string | undefined;
  readonly until?: string | undefined;
}
