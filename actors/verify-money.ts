// verify-money: holds three books of a tenant's money against each other: what the sessions said their attempts came to, what the budget
// settled (its journal is the ledger), and what the usage projection sums to. To the micro-dollar. Reads, changes nothing.
//
//   session: out budget.settle ──▶ awaited ──▶ budget: command budget.settle ──▶ budget.settled / budget.unreserved
//                                                                                        │ Σ up to the projection's position
//                                                                          usage rows: Σ ┘
//
// Memory: one entry for each attempt that ended and whose budget has not decided it yet, and a few sums per tenant.
import { HOLD_PATTERN } from "../protocol/commands.ts";
import { parseActorPath } from "../protocol/ids.ts";
import type { JournalMessage } from "../protocol/journal.ts";
import type { Json } from "../protocol/json.ts";

/** What the usage projection sums to, read at one moment. */
export interface UsageCosts {
  /** Every journal message up to this stream sequence is in it. */
  readonly position: number;
  /** tenant → micro-dollars */
  readonly by_tenant: ReadonlyMap<string, number>;
}

interface Fault {
  readonly actor: string;
  readonly stream_sequence: number;
  readonly seq: number | null;
  readonly what: string;
}

/** Whoever sends a settlement publishes it at once, and again after a crash; one that is not decided after this is lost. */
const DECIDED_WITHIN_MS = 60_000;

interface Awaited {
  readonly session: string;
  readonly cost_usd_micros: number | null;
  /** What the usage rows have of it until the budget has decided: the whole, or what ended before the rest was lost. */
  readonly known_usd_micros: number;
  readonly stream_sequence: number;
  readonly seq: number;
  readonly at_ms: number;
}

interface Books {
  readonly awaited: Map<string, Awaited>;
  /** Of `awaited`, where it is known. */
  awaited_usd_micros: number;
  settled_usd_micros: number;
  unreserved_usd_micros: number;
  last_sequence: number;
  /** A tenant whose sessions never asked for money has no budget, and nobody to settle with. */
  has_budget: boolean;
  /** What the usage rows must sum to at the projection's position. */
  at_position: number | undefined;
}

export interface MoneyCheck {
  message(message: JournalMessage, stream_sequence: number): void;
  end(): void;
}

const amountOf = (value: Json | undefined): number => (typeof value === "number" ? value : 0);

export function createMoneyCheck(usage: UsageCosts | undefined, report: (fault: Fault) => void): MoneyCheck {
  const tenants = new Map<string, Books>();
  let last_at_ms = 0;
  const booksOf = (tenant: string): Books => {
    let books = tenants.get(tenant);
    if (books === undefined)
      tenants.set(
        tenant,
        (books = {
          awaited: new Map(),
          awaited_usd_micros: 0,
          settled_usd_micros: 0,
          unreserved_usd_micros: 0,
          last_sequence: 0,
          has_budget: false,
          at_position: undefined,
        }),
      );
    return books;
  };
  const sumOf = (books: Books): number => books.settled_usd_micros + books.unreserved_usd_micros + books.awaited_usd_micros;

  function ended(message: JournalMessage, stream_sequence: number, books: Books): void {
    for (const out of message.out) {
      if (out.type !== "budget.settle" || parseActorPath(out.to)?.kind !== "budget") continue;
      const { hold, cost_usd_micros, spent_usd_micros } = out.body;
      if (typeof hold !== "string" || !HOLD_PATTERN.test(hold)) continue; // The budget refuses it as invalid; no money is in it.
      const cost = typeof cost_usd_micros === "number" ? cost_usd_micros : null;
      const session = `${message.actor.tenant}/session/${message.actor.id}`;
      if (books.awaited.has(hold)) {
        report({ actor: session, stream_sequence, seq: message.seq, what: `the hold ${hold} is settled a second time` });
        continue;
      }
      const known_usd_micros = cost ?? amountOf(spent_usd_micros);
      books.awaited.set(hold, { session, cost_usd_micros: cost, known_usd_micros, stream_sequence, seq: message.seq, at_ms: Date.parse(message.at) });
      books.awaited_usd_micros += known_usd_micros;
    }
  }

  function decided(message: JournalMessage, stream_sequence: number, books: Books): void {
    const path = `${message.actor.tenant}/budget/${message.actor.id}`;
    books.has_budget = true;
    const fault = (what: string): void => report({ actor: path, stream_sequence, seq: message.seq, what });
    const settled = new Map(message.events.filter(({ type }) => type === "budget.settled").map((event) => [String(event["hold"]), event]));
    for (const event of message.events) {
      if (event.type === "budget.settled") books.settled_usd_micros += amountOf(event["cost_usd_micros"]);
      if (event.type === "budget.unreserved") books.unreserved_usd_micros += amountOf(event["cost_usd_micros"]);
    }
    for (const entry of message.entries) {
      if (entry.t !== "command" || entry.type !== "budget.settle") continue;
      const hold = String(entry.body["hold"]);
      const said = books.awaited.get(hold);
      if (said === undefined) continue; // A repeat whose key was forgotten, or somebody's who is no session.
      books.awaited.delete(hold);
      books.awaited_usd_micros -= said.known_usd_micros;
      const event = settled.get(hold);
      if ((entry.body["cost_usd_micros"] ?? null) !== said.cost_usd_micros)
        fault(
          `${said.session} said that ${hold} cost ${said.cost_usd_micros ?? "nobody knows what"}, the budget heard ${JSON.stringify(entry.body["cost_usd_micros"])}`,
        );
      else if (event !== undefined && said.cost_usd_micros !== null && event["cost_usd_micros"] !== said.cost_usd_micros)
        fault(`${hold} cost ${said.cost_usd_micros} and is settled at ${JSON.stringify(event["cost_usd_micros"])}`);
      else if (event !== undefined && (event["assumed"] === true) !== (said.cost_usd_micros === null))
        fault(`${hold} is settled as ${event["assumed"] === true ? "assumed, and its cost is known" : "known, and nobody knew its cost"}`);
    }
  }

  return {
    message(message, stream_sequence) {
      const { tenant, kind } = message.actor;
      last_at_ms = Math.max(last_at_ms, Date.parse(message.at));
      if (usage !== undefined && stream_sequence > usage.position) for (const books of tenants.values()) books.at_position ??= sumOf(books);
      if (kind !== "session" && kind !== "budget") return;
      const books = booksOf(tenant);
      // A tenant that begins after the projection's position has nothing in it.
      if (usage !== undefined && stream_sequence > usage.position) books.at_position ??= 0;
      books.last_sequence = stream_sequence;
      if (kind === "session") ended(message, stream_sequence, books);
      else decided(message, stream_sequence, books);
    },
    end() {
      for (const [tenant, books] of tenants) {
        const overdue = [...books.awaited].filter(([, one]) => books.has_budget && one.at_ms + DECIDED_WITHIN_MS < last_at_ms && one.known_usd_micros > 0);
        for (const [hold, one] of overdue)
          report({
            actor: one.session,
            stream_sequence: one.stream_sequence,
            seq: one.seq,
            what: `the settlement of ${hold} (${one.known_usd_micros} micro-dollars) never reached the budget`,
          });
        if (usage === undefined) continue;
        const expected = books.at_position ?? sumOf(books);
        const rows = usage.by_tenant.get(tenant) ?? 0;
        if (rows !== expected)
          report({
            actor: `${tenant}/budget/main`,
            stream_sequence: books.last_sequence,
            seq: null,
            what: `the usage rows sum to ${rows} micro-dollars, the ledger to ${expected} (drift ${rows - expected})`,
          });
      }
    },
  };
}
