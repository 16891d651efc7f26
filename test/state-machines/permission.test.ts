// Goal: PE1 to PE3: what may be done follows from what the tenant said, and from nothing that is missing.
// Method: the small table of every kind of rule; drawn rules in drawn orders.
import { expect, test } from "vitest";
import { agentConfig, COMMANDS } from "../../protocol/commands.ts";
import { allowed, type Grant, permissionsOf, type Policy } from "../../state-machines/permission.ts";
import { seededRandom } from "../simulation/virtual-world.ts";

const OPEN: Policy = { default: "allow", deny: [] };
const CLOSED: Policy = { default: "deny", deny: [] };
const grants: Record<string, Grant> = {
  reader: { allow: ["tool:now", "model:simulated/*"], deny: [] },
  careful: { allow: [], deny: ["tool:pay"] },
};
const may = (policy: Policy, roles: readonly string[], kind: "tool" | "model" | "memory", name: string): boolean =>
  allowed(permissionsOf(policy, grants, roles), { kind, name }).kind === "allowed";

test.each([
  ["by default, when the default is to allow", OPEN, [], "tool", "now", true],
  ["not by default, when the default is to deny", CLOSED, [], "tool", "now", false],
  ["by a grant of a role", CLOSED, ["reader"], "tool", "now", true],
  ["not by a grant of another role", CLOSED, ["careful"], "tool", "now", false],
  ["by a rule that ends in *", CLOSED, ["reader"], "model", "simulated/echo", true],
  ["not by a rule whose beginning differs", CLOSED, ["reader"], "model", "openai/echo", false],
  ["not by the name of another kind", CLOSED, ["reader"], "memory", "now", false],
  ["not by a part of a name", CLOSED, ["reader"], "tool", "now_too", false],
  ["not when a role denies it", OPEN, ["careful"], "tool", "pay", false],
  ["not when the tenant denies it", { default: "allow", deny: ["tool:*"] } as Policy, [], "tool", "anything", false],
  ["PE1: not when one allows and another denies", { default: "allow", deny: ["tool:now"] } as Policy, ["reader"], "tool", "now", false],
  ["not by a role that nobody granted anything", CLOSED, ["toString", "__proto__"], "tool", "now", false],
] as const)("an action is permitted %s", (_, policy, roles, kind, name, permitted) => {
  expect(may(policy, roles, kind, name)).toBe(permitted);
});

test("PE2: without a policy nothing is permitted, and the refusal says what is missing", () => {
  expect(allowed(undefined, { kind: "tool", name: "now" })).toEqual({ kind: "denied", message: "what is permitted is not known, so tool:now is not" });
});

test("PE3: the order in which things were said changes nothing", () => {
  const random = seededRandom(5);
  const shuffled = <T>(all: readonly T[]): T[] =>
    all
      .map((one) => ({ one, at: random() }))
      .sort((a, b) => a.at - b.at)
      .map(({ one }) => one);
  const rules = ["tool:a", "tool:b", "model:c/*", "memory:*"];
  const first = permissionsOf({ default: "deny", deny: rules }, grants, ["reader", "careful"]);
  for (let round = 0; round < 50; round += 1)
    expect(permissionsOf({ default: "deny", deny: shuffled([...rules, ...rules]) }, grants, shuffled(["reader", "careful"]))).toEqual(first);
});

test("a rule is a kind and a name, or the beginning of one; anything else is refused before it is kept", () => {
  const { body } = COMMANDS.tenant["grant.put"];
  for (const rule of ["tool:now", "tool:*", "model:openai/*", "memory:a b".replace(" ", "_")])
    expect([rule, body.safeParse({ role: "r", allow: [rule] }).success]).toEqual([rule, true]);
  for (const rule of ["*", "tools:now", "tool:*now", "tool:a*b", "tool", "TOOL:now", "tool:a b", "tool:\n"])
    expect([rule, body.safeParse({ role: "r", allow: [rule] }).success]).toEqual([rule, false]);
});

test("a guardrail that cannot be kept is refused before it is kept", () => {
  const parse = (guardrails: unknown): boolean => agentConfig.safeParse({ model: "simulated/echo", guardrails }).success;
  const rule = { name: "r", on: "input" };
  expect(
    parse([
      { ...rule, kind: "pattern", pattern: "a+" },
      { name: "s", on: "output", kind: "secret" },
    ]),
  ).toBe(true);
  expect(parse([{ ...rule, kind: "pattern", pattern: "(" }])).toBe(false);
  expect(parse([{ ...rule, kind: "size" }])).toBe(false);
  expect(parse([{ ...rule, kind: "magic" }])).toBe(false);
  expect(
    parse([
      { ...rule, kind: "secret" },
      { ...rule, kind: "secret" },
    ]),
  ).toBe(false);
});
