// printer: how the command line speaks: aligned columns and a little colour for people, JSON for machines.
//
// Invariants:
//   O1. With --json stdout holds JSON and nothing else: one document, or one object a line; words for people go to stderr.
//   O2. Colour and other escape sequences only on a terminal, and never with NO_COLOR.
//   O3. What came from outside is shown without its control characters, so that a customer's text cannot drive an operator's terminal.
import { stripVTControlCharacters, styleText } from "node:util";
import type { ErrorBody } from "../protocol/errors.ts";
import type { TextOutput } from "./ports.ts";

export type Style = "bold" | "dim" | "red" | "green" | "yellow" | "cyan" | "strikethrough";

export interface Printer {
  readonly json: boolean;
  /** Is a person looking? */
  readonly terminal: boolean;
  style(style: Style, text: string): string;
  line(text?: string): void;
  /** Text without a line's end, as it comes. */
  text(text: string): void;
  /** Aligned columns; a header only where there are rows. */
  table(columns: readonly string[], rows: readonly (readonly unknown[])[]): void;
  /** `name  value` pairs, the names aligned. */
  pairs(pairs: readonly (readonly [string, unknown])[]): void;
  document(value: unknown): void;
  json_line(value: unknown): void;
  /** On stderr. */
  note(text: string): void;
  refused(error: ErrorBody): void;
}

/** Without escape sequences and control characters; line breaks and tabs stay where `lines` is asked for. */
export function plain(value: unknown, lines = false): string {
  const text = stripVTControlCharacters(typeof value === "string" ? value : value === null || value === undefined ? "–" : (JSON.stringify(value) ?? "–"));
  // biome-ignore lint: control characters are what this is about.
  return lines ? text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/g, "") : text.replace(/[\u0000-\u001f\u007f-\u009f]+/g, " ");
}

export function createPrinter(stdout: TextOutput, stderr: TextOutput, options: { json: boolean; env: Readonly<Record<string, string | undefined>> }): Printer {
  const terminal = stdout.isTTY === true;
  const colours = terminal && !options.json && (options.env["NO_COLOR"] ?? "") === "" && options.env["TERM"] !== "dumb";
  const style = (name: Style, text: string): string => (colours ? styleText(name, text, { validateStream: false }) : text);
  const line = (text = ""): void => void stdout.write(`${text}\n`);

  return {
    json: options.json,
    terminal,
    style,
    line,
    text: (text) => void stdout.write(text),
    table(columns, rows) {
      if (rows.length === 0) return;
      const cells = rows.map((row) => row.map((cell) => plain(cell)));
      const widths = columns.map((column, index) => Math.max(column.length, ...cells.map((row) => (row[index] ?? "").length)));
      // Numbers stand to the right, so that they can be compared by eye.
      const numeric = columns.map(
        (_, index) => rows.every((row) => typeof row[index] === "number" || row[index] === null) && rows.some((row) => typeof row[index] === "number"),
      );
      const aligned = (row: readonly string[]): string =>
        row
          .map((cell, index) => (numeric[index] ? cell.padStart(widths[index] ?? 0) : cell.padEnd(widths[index] ?? 0)))
          .join("  ")
          .trimEnd();
      line(style("bold", aligned(columns)));
      for (const row of cells) line(aligned(row));
    },
    pairs(pairs) {
      const width = Math.max(0, ...pairs.map(([name]) => name.length));
      for (const [name, value] of pairs) line(`${style("dim", name.padEnd(width))}  ${plain(value)}`);
    },
    document: (value) => line(JSON.stringify(value, null, 2)),
    json_line: (value) => line(JSON.stringify(value)),
    note: (text) => void stderr.write(`${text}\n`),
    refused(error) {
      if (options.json) line(JSON.stringify({ ok: false, error }));
      stderr.write(`${style("red", error.code)}: ${plain(error.message)}\n`);
      const errors = error.details?.["errors"];
      if (Array.isArray(errors) && errors.length > 1)
        for (const one of errors) {
          const { pointer, message } = one as { pointer?: unknown; message?: unknown };
          stderr.write(`  ${plain(pointer) || "/"}: ${plain(message)}\n`);
        }
    },
  };
}

/** Micro-dollars for people. */
export function dollars(micros: number | null): string {
  if (micros === null) return "unknown";
  return `$${(micros / 1_000_000).toFixed(micros !== 0 && Math.abs(micros) < 10_000 ? 6 : 4)}`;
}

/** How long ago, in the largest unit that says it. */
export function ago(ms: number): string {
  const s = Math.max(0, Math.round(ms / 1000));
  if (s < 120) return `${s} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  if (s < 172_800) return `${Math.round(s / 3600)} h`;
  return `${Math.round(s / 86_400)} d`;
}

export function bytes(count: number): string {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let value = count;
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? value : value.toFixed(1)} ${units[unit]}`;
}
