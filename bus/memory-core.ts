// memory-core: messages without memory: subjects, wildcards, queue groups, answers. Who listens now hears it, nobody else.
import { covers, isLiteral } from "./streams.ts";
import type { CoreMessage } from "./port.ts";

export interface CoreSubscriber {
  readonly subject: string;
  readonly queue: string | undefined;
  readonly connection: string;
  /** Hands it on; the connection decides whether it is still there to hear. */
  hear(message: CoreMessage): void;
}

export class MemoryCore {
  #literal = new Map<string, Set<CoreSubscriber>>();
  #patterns = new Set<CoreSubscriber>();
  #random: () => number;

  constructor(random: () => number) {
    this.#random = random;
  }

  add(subscriber: CoreSubscriber): () => void {
    if (!isLiteral(subscriber.subject)) {
      this.#patterns.add(subscriber);
      return () => void this.#patterns.delete(subscriber);
    }
    const there = this.#literal.get(subscriber.subject) ?? new Set();
    this.#literal.set(subscriber.subject, there.add(subscriber));
    return () => {
      there.delete(subscriber);
      if (there.size === 0 && this.#literal.get(subscriber.subject) === there) this.#literal.delete(subscriber.subject);
    };
  }

  /** Answers whether anybody was there to hear it. Of a queue group one member hears it. */
  publish(message: CoreMessage): boolean {
    const groups = new Map<string, CoreSubscriber[]>();
    const everybody: CoreSubscriber[] = [];
    const meet = (subscriber: CoreSubscriber): void => {
      if (subscriber.queue === undefined) return void everybody.push(subscriber);
      const key = `${subscriber.subject} ${subscriber.queue}`;
      groups.set(key, [...(groups.get(key) ?? []), subscriber]);
    };
    for (const subscriber of this.#literal.get(message.subject) ?? []) meet(subscriber);
    for (const subscriber of this.#patterns) if (covers(subscriber.subject, message.subject)) meet(subscriber);
    for (const members of groups.values()) everybody.push(members[Math.floor(this.#random() * members.length)] as CoreSubscriber);
    for (const subscriber of everybody) subscriber.hear(message);
    return everybody.length > 0;
  }
}
