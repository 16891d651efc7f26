// Goal: a provider's window holds what was used or may still be used, and nothing else: what a call did not use comes back with its settlement,
// once, and never anything of another's.
// Method: stories with the numbers written out; and an accountant who keeps a list of all that was granted, and is compared with every decision of
// RUNS drawn runs: of nobody's grant is any span of the window too full, nobody is refused who has room.
import { describe, expect, test } from "vitest";
import { checkCommand } from "../../protocol/commands.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { budgetContextOf } from "../../state-machines/budget-context.ts";
import { budgetDefinition } from "../../state-machines/budget.ts";
import { type RateLimit, rateUsed } from "../../state-machines/budget-rate.ts";
import { coreOf } from "../../state-machines/step.ts";
import { seededRandom } from "../simulation/virtual-world.ts";
import { Drive } from "./drive.ts";

const core = coreOf(budgetDefinition);
const T0 = Date.UTC(2026, 10, 18, 12);
const WINDOW_MS = 60_000;
const SLICE_MS = 1_000;
const BOUNDS = { requests_max: 10, tokens_max: 1_000, window_ms: WINDOW_MS };

const fresh = (rates: JsonObject = { p: BOUNDS }, more: JsonObject = {}): Drive => {
  const drive = new Drive(core, { tenant: "acme", kind: "budget", id: "main" });
  drive.at_ms = T0;
  drive.create({}).tell("budget.configure", { level: "tenant", rates, ...more });
  return drive;
};
const hold = (n: number): string => `acme/session/s1/${n}:model/1`;
const reserve = (drive: Drive, n: number, tokens: number, more: JsonObject = {}, rate: JsonObject = {}): JsonObject => {
  const body = {
    hold: hold(n),
    session: "s1",
    agent: "a",
    model: "p/m",
    amount_usd_micros: 5,
    minimum_usd_micros: 1,
    rate: { provider: "p", tokens, returns: true, ...rate },
    ...more,
  };
  if (drive.thorough) expect(checkCommand("budget", "control", "budget.reserve", body as JsonObject)).toMatchObject({ kind: "command" });
  return drive.tell("budget.reserve", body as JsonObject);
};
const settle = (drive: Drive, n: number, used?: readonly JsonObject[], cost_usd_micros: number | null = 1): JsonObject => {
  const body = { hold: hold(n), cost_usd_micros, ...(used === undefined ? {} : { used }) };
  if (drive.thorough) expect(checkCommand("budget", "control", "budget.settle", body as JsonObject)).toMatchObject({ kind: "command" });
  return drive.tell("budget.settle", body as JsonObject);
};
const isGranted = (result: JsonObject): boolean => result["refused"] === undefined;
const inWindow = (drive: Drive, provider = "p"): { requests: number; tokens: number } => {
  const { rates, tier, tier_windows = {} } = budgetContextOf(drive.view);
  const own = rates[provider];
  return own === undefined ? rateUsed(tier as RateLimit, tier_windows[provider] ?? [], drive.at_ms) : rateUsed(own.limit, own.window, drive.at_ms);
};

describe("a call that was settled", () => {
  test("leaves in the window what it used, and the rest is there for the next one at once", () => {
    const drive = fresh();
    expect(isGranted(reserve(drive, 1, 900))).toBe(true);
    expect(isGranted(reserve(drive, 2, 200))).toBe(false);
    drive.later(2_500);
    settle(drive, 1, [{ provider: "p", requests: 1, tokens: 150 }]);
    expect(drive.told).toContainEqual(expect.objectContaining({ type: "budget.settled", rates_unused: [{ provider: "p", requests: 0, tokens: 750 }] }));
    expect(inWindow(drive)).toEqual({ requests: 1, tokens: 150 });
    expect(isGranted(reserve(drive, 2, 850))).toBe(true);
    expect(isGranted(reserve(drive, 3, 1))).toBe(false);
  });

  test("twice, or that ends after its slice has left the window, gives back nothing more", () => {
    const drive = fresh();
    reserve(drive, 1, 900);
    settle(drive, 1, [{ provider: "p", requests: 1, tokens: 100 }]);
    settle(drive, 1, [{ provider: "p", requests: 0, tokens: 0 }]);
    expect(inWindow(drive)).toEqual({ requests: 1, tokens: 100 });
    reserve(drive, 2, 900);
    drive.later(WINDOW_MS + 2 * SLICE_MS);
    reserve(drive, 3, 1_000);
    settle(drive, 2, [{ provider: "p", requests: 1, tokens: 0 }]);
    expect(inWindow(drive)).toEqual({ requests: 1, tokens: 1_000 });
  });

  test("with what nobody knows gives nothing back: a lost attempt, an estimate, a caller that does not say", () => {
    const drive = fresh({ p: { ...BOUNDS, tokens_max: 10_000 } });
    reserve(drive, 1, 100);
    settle(drive, 1, undefined, null);
    reserve(drive, 2, 100);
    settle(drive, 2, [{ provider: "p", requests: 1, tokens: null }]);
    reserve(drive, 3, 100, { rate: { provider: "p", tokens: 100 } });
    settle(drive, 3, [{ provider: "p", requests: 1, tokens: 10 }]);
    expect(inWindow(drive)).toEqual({ requests: 3, tokens: 300 });
    expect(drive.events.filter((event) => "rates_unused" in event)).toEqual([]);
  });

  test("without a call, or that was released, gives all of it back, its request too", () => {
    const drive = fresh();
    reserve(drive, 1, 400);
    reserve(drive, 2, 400);
    settle(drive, 1, undefined, 0);
    expect(inWindow(drive)).toEqual({ requests: 1, tokens: 400 });
    drive.tell("budget.release", { hold: hold(2) });
    expect(inWindow(drive)).toEqual({ requests: 0, tokens: 0 });
  });

  test("above what it took counts for all of it: what a provider has counted is never forgotten", () => {
    const drive = fresh();
    reserve(drive, 1, 400);
    settle(drive, 1, [{ provider: "p", requests: 1, tokens: 900 }]);
    expect(inWindow(drive)).toEqual({ requests: 1, tokens: 900 });
    expect(isGranted(reserve(drive, 2, 101))).toBe(false);
  });

  test("gives each provider back its own: what was tried elsewhere, under the tenant's tier", () => {
    const drive = fresh({ p: BOUNDS }, { tier: { name: "t", ...BOUNDS } });
    expect(reserve(drive, 1, 500)).toMatchObject({ rated: true });
    expect(drive.tell("rate.acquire", { provider: "q", requests: 1, tokens: 700, hold: hold(1) })).toEqual({ granted: true });
    settle(drive, 1, [{ provider: "q", requests: 1, tokens: 60 }]);
    expect([inWindow(drive), inWindow(drive, "q")]).toEqual([
      { requests: 0, tokens: 0 },
      { requests: 1, tokens: 60 },
    ]);
  });

  test("after its windows were laid anew takes nothing from what others took meanwhile", () => {
    const drive = fresh();
    reserve(drive, 1, 900);
    drive.tell("budget.configure", { level: "tenant", rates: { p: null } });
    drive.tell("budget.configure", { level: "tenant", rates: { p: BOUNDS } });
    reserve(drive, 2, 900);
    settle(drive, 1, [{ provider: "p", requests: 0, tokens: 0 }]);
    expect(inWindow(drive)).toEqual({ requests: 1, tokens: 900 });
  });
});

test("a cheaper call takes its place in the window of the provider that it goes to", () => {
  const drive = fresh({ p: BOUNDS, q: BOUNDS }, { limit_usd_micros: 5 });
  const degraded = { model: "q/m", amount_usd_micros: 5, minimum_usd_micros: 1, rate: { provider: "q", tokens: 70, returns: true } };
  expect(reserve(drive, 1, 300, { amount_usd_micros: 50, minimum_usd_micros: 50, degraded })).toMatchObject({ choice: "degraded" });
  expect([inWindow(drive), inWindow(drive, "q")]).toEqual([
    { requests: 0, tokens: 0 },
    { requests: 1, tokens: 70 },
  ]);
});

test("a place for an attempt that has ended is refused and takes nothing", () => {
  const drive = fresh();
  reserve(drive, 1, 100);
  settle(drive, 1, [{ provider: "p", requests: 1, tokens: 100 }]);
  expect(drive.tell("rate.acquire", { provider: "p", requests: 1, tokens: 100, hold: hold(1) })).toMatchObject({ refused: { code: "conflict" } });
  expect(inWindow(drive)).toEqual({ requests: 1, tokens: 100 });
});

test("who does not say that he returns hears what he always heard", () => {
  const drive = fresh();
  const result = drive.tell("budget.reserve", {
    hold: hold(1),
    session: "s1",
    agent: "a",
    model: "p/m",
    amount_usd_micros: 5,
    minimum_usd_micros: 1,
    rate: { provider: "p", tokens: 1 },
  });
  expect(Object.keys(result)).not.toContain("rated");
  expect(Object.keys(budgetContextOf(drive.view).holds.flatMap((bucket) => Object.values(bucket))[0] ?? {})).not.toContain("taken");
});

// ── the accountant ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

const RUNS = Number(process.env["BUDGET_RUNS"] ?? 3_000);

interface Grant {
  readonly at_ms: number;
  readonly n: number;
  requests: number;
  tokens: number;
}

function run(seed: number): { grants: number; refusals: number; back: number; regained: number; crashes: number } {
  const draw = seededRandom(seed);
  const pick = (below: number): number => Math.floor(draw() * below);
  const met = { grants: 0, refusals: 0, back: 0, regained: 0, crashes: 0 };
  const tiered = pick(3) === 0;
  let drive = tiered ? fresh({}, { tier: { name: "t", ...BOUNDS } }) : fresh();
  drive.thorough = seed % 100 === 0;
  const grants: Grant[] = [];
  const open = new Set<number>();
  let last_return_ms = -1;
  let next = 1;
  const sum = (from_ms: number): { requests: number; tokens: number } =>
    grants
      .filter(({ at_ms }) => at_ms > from_ms)
      .reduce((all, { requests, tokens }) => ({ requests: all.requests + requests, tokens: all.tokens + tokens }), { requests: 0, tokens: 0 });
  const steps = 12 + pick(30);
  for (let step = 0; step < steps; step++) {
    drive.later(pick(8) === 0 ? pick(40_000) : pick(2_000));
    const roll = pick(100);
    if (roll < 55) {
      const tokens = 1 + pick(600);
      // A further call of a hold that is open, or the first of a new one.
      const again = open.size > 0 && pick(4) === 0 ? [...open][pick(open.size)] : undefined;
      const n = again ?? next++;
      const result = again === undefined ? reserve(drive, n, tokens) : drive.tell("rate.acquire", { provider: "p", requests: 1, tokens, hold: hold(n) });
      if (isGranted(result)) {
        grants.push({ at_ms: drive.at_ms, n, requests: 1, tokens });
        open.add(n);
        met.grants++;
        const held = sum(drive.at_ms - WINDOW_MS);
        if (held.requests > BOUNDS.requests_max || held.tokens > BOUNDS.tokens_max) expect(held, `seed ${seed} step ${step}: W1`).toBe("within the limit");
        if (last_return_ms >= 0) met.regained++;
      } else {
        met.refusals++;
        const held = sum(drive.at_ms - WINDOW_MS - SLICE_MS);
        const has_room = held.requests + 1 <= BOUNDS.requests_max && held.tokens + tokens <= BOUNDS.tokens_max;
        if (has_room) expect(held, `seed ${seed} step ${step}: nobody is refused who has room`).toBe("too full");
      }
      last_return_ms = -1;
    } else if (roll < 90 && open.size > 0) {
      const n = [...open][pick(open.size)] as number;
      open.delete(n);
      const mine = grants.filter((one) => one.n === n);
      const fate = pick(10);
      if (fate < 2) settle(drive, n, undefined, null);
      else if (fate < 4) {
        if (fate < 3) drive.tell("budget.release", { hold: hold(n) });
        else settle(drive, n, undefined, 0);
        for (const one of mine) Object.assign(one, { requests: 0, tokens: 0 });
      } else {
        // So many of its calls were made, and used so much; what was taken last is what is kept.
        const requests = pick(mine.length + 1);
        const tokens = requests === 0 ? 0 : pick(mine.reduce((all, one) => all + one.tokens, 0) + 1);
        settle(drive, n, requests === 0 ? [] : [{ provider: "p", requests, tokens }]);
        const left = { requests, tokens };
        for (const one of mine.toReversed()) {
          const kept = { requests: Math.min(one.requests, left.requests), tokens: Math.min(one.tokens, left.tokens) };
          Object.assign(one, kept);
          left.requests -= kept.requests;
          left.tokens -= kept.tokens;
        }
        met.back++;
      }
      last_return_ms = drive.at_ms;
    } else {
      const saved = JSON.parse(JSON.stringify(drive.saved)) as typeof drive.saved;
      const successor = drive.copyTo(new Drive(core, drive.actor));
      Object.assign(successor, { thorough: drive.thorough, epoch: drive.epoch + 1 });
      expect(core.save(core.load(saved))).toEqual(saved);
      drive = successor;
      met.crashes++;
    }
    const [is, should] = [inWindow(drive), sum(drive.at_ms - WINDOW_MS)];
    if (is.requests < should.requests || is.tokens < should.tokens) expect(is, `seed ${seed} step ${step}: BW1`).toEqual(should);
  }
  return met;
}

test(`no window has more than its limit and nobody is refused who has room, in ${RUNS} drawn runs`, { timeout: 900_000 }, () => {
  const total = { grants: 0, refusals: 0, back: 0, regained: 0, crashes: 0 };
  const only = process.env["SEED"];
  const seeds = only === undefined ? Array.from({ length: RUNS }, (_, index) => index + 1) : [Number(only)];
  for (const seed of seeds) for (const [name, count] of Object.entries(run(seed))) total[name as keyof typeof total] += count;
  if (only !== undefined) return;
  for (const [name, count] of Object.entries(total)) expect(count, `the walk met ${name}`).toBeGreaterThan(RUNS / 10);
});
