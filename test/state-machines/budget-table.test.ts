// Goal:   a table of many rows can be told from any other list, and counted, by whoever only has its JSON.
// Method: tables with and without rows, and lists of the same length that are none.
import { expect, test } from "vitest";
import { emptyTable, tableDrop, tablePut, tableSize } from "../../state-machines/budget-table.ts";

test("a table is counted by its rows, and nothing else is taken for one", () => {
  let table = emptyTable<number>();
  expect(tableSize(table)).toBe(0);
  for (let n = 0; n < 100; n += 1) table = tablePut(table, `acme/session/${n}`, n);
  expect(tableSize(table)).toBe(100);
  expect(tableSize(tableDrop(table, "acme/session/7"))).toBe(99);
  const as_long = Array.from({ length: table.length }, () => 0);
  for (const other of [null, 3, "text", {}, [], as_long, as_long.map(() => ({ name: 1 })), as_long.map(() => [])]) expect(tableSize(other)).toBeUndefined();
});
