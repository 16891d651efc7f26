// session-failure: how a call ended that has no output, as a session keeps it: in its transcript, its tools and its initialisation.

/** Of its text: enough for a person and a model. */
export const FAILURE_CHARACTERS_MAX = 1000;

export interface Failed {
  readonly code: string;
  readonly message: string;
}
