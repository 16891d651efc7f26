// reader: somebody who reads a session through a gateway, comes back with the cursor when the connection is lost, and compares every
// item with what the journal and the models really said.
import { type Cursor, CURSOR_START } from "../../gateway/cursor.ts";
import type { FeedItem } from "../../gateway/session-feed.ts";
import { type ActorAddress, actorPath } from "../../protocol/ids.ts";
import { canonicalJson } from "../../protocol/json.ts";
import type { Journal } from "./watch.ts";

/** What the models really said: `{path} {turn}.{step}.{attempt}` → the whole text of that attempt. */
export type Spoken = ReadonlyMap<string, string>;

export interface ReaderDeps {
  readonly actor: ActorAddress;
  readonly name: string;
  readonly slow_ms: number;
  journal(): Journal;
  readonly spoken: Spoken;
  fail(what: string): void;
}

export class Reader {
  readonly deps: ReaderDeps;
  cursor: Cursor = CURSOR_START;
  /** Events that were given. */
  given = 0;
  tokens = 0;
  #open = new Map<string, { attempt: number; text: string }>();

  constructor(deps: ReaderDeps) {
    this.deps = deps;
  }

  take(item: FeedItem): void {
    if (item.kind === "gap") return;
    const { fail, name } = this.deps;
    const path = actorPath(this.deps.actor);
    this.cursor = item.cursor;
    if (item.kind === "token") {
      this.tokens++;
      const step = `${item.turn}.${item.step}`;
      const before = this.#open.get(step);
      if (before !== undefined && item.attempt < before.attempt)
        fail(`M3: ${name} is given attempt ${item.attempt} of step ${step} after attempt ${before.attempt}`);
      const text = (before?.attempt === item.attempt ? before.text : "") + item.text;
      this.#open.set(step, { attempt: item.attempt, text });
      const whole = this.deps.spoken.get(`${path} ${step}.${item.attempt}`);
      if (whole === undefined) fail(`M3: ${name} is given text of ${path} ${step}.${item.attempt}, which no model said`);
      else if (!whole.startsWith(text)) fail(`M2: ${name} was given '${text}' of ${path} ${step}.${item.attempt}, the model said '${whole}'`);
      return;
    }
    const expected = this.deps.journal().events[this.given];
    if (expected === undefined || canonicalJson(expected) !== canonicalJson(item.event))
      fail(
        `M1: ${name} is given ${canonicalJson(item.event).slice(0, 200)} as event ${this.given} of ${path}, the journal has ${expected === undefined ? "none" : canonicalJson(expected).slice(0, 200)}`,
      );
    this.given++;
    const { type } = item.event;
    const step = `${String(item.event["turn"])}.${String(item.event["step"])}`;
    if (type === "superseded") this.#open.set(step, { attempt: Number(item.event["attempt"]) + 1, text: "" });
    if (type !== "model.completed") return;
    const attempt = Number(item.event["attempt"]);
    const whole = this.deps.spoken.get(`${path} ${step}.${attempt}`) ?? "";
    const shown = this.#open.get(step);
    const text = shown?.attempt === attempt ? shown.text : "";
    if (text !== whole) fail(`M2: ${name} has '${text}' of ${path} ${step}.${attempt} when it ends, the model said '${whole}'`);
  }
}
