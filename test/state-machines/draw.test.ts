// Goal: the pictures in docs/machines/ are those of the machines.
// Method: drawn again and compared; every state and every command of the wire must be in the text.
import { readFile } from "node:fs/promises";
import { describe, expect, test } from "vitest";
import { COMMANDS } from "../../protocol/commands.ts";
import { drawings, toMermaid } from "../../state-machines/draw.ts";
import { definitions } from "../../state-machines/kinds.ts";

const DIR = new URL("../../docs/machines/", import.meta.url);

describe("docs/machines", () => {
  test("holds the pictures of the machines as they are (draw again with drawAll)", async () => {
    const files = Object.entries(await drawings());
    expect(files).toHaveLength(2 * Object.keys(definitions).length);
    for (const [name, content] of files) expect(await readFile(new URL(name, DIR), "utf8"), name).toBe(content);
  });

  test.each(Object.values(definitions))("the picture of a $kind names its states and what leads from one to another", ({ kind, machine, creates }) => {
    const text = toMermaid(machine, creates);
    for (const state of Object.keys(machine.states)) expect(text).toContain(state);
    const leading = Object.keys(COMMANDS[kind]).filter((type) => !/^(key|agent|grant)\.|^(tenant\.configure|config\.updated)$/.test(type));
    for (const type of leading) expect(text).toContain(type);
  });
});
