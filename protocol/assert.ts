// assert: states a promise of ours in the code that keeps it. Bad input is never asserted; it is refused with a typed outcome.

/** A promise of ours that did not hold. Never caused by input; always a bug worth a page. */
export class BrokenPromise extends Error {
  override readonly name = "BrokenPromise";
}

/** Throws BrokenPromise naming the property, stated positively, when it does not hold. */
export function assert(holds: unknown, property: string): asserts holds {
  if (!holds) throw new BrokenPromise(property);
}

/** For the default of an exhaustive switch: a new tag does not compile, and a foreign one does not pass. */
export function unreachable(value: never, what: string): never {
  throw new BrokenPromise(`${what} is one of its declared values, not ${JSON.stringify(value)}`);
}
