// vitest.config: three groups of tests, one after another. Those of the rooms run side by side; those that start a whole Troupe run two at a
// time, for they mostly wait; those that kill and pause processes or watch the clock run last, one file at a time, so that none disturbs them.
import { defineConfig } from "vitest/config";

const setupFiles = ["test/harness/setup.ts"];
const WATCH_THE_CLOCK = [
  "test/chaos/**/*.test.ts",
  "test/integration/takeover.test.ts",
  "test/integration/drain.test.ts",
  "test/integration/autonomy.test.ts",
  "test/integration/fair-dispatch.test.ts",
  "test/integration/call-timeout.test.ts",
  "test/integration/waits.test.ts",
  "test/integration/rates.test.ts",
  "test/integration/crowded-tenant.test.ts",
  "test/integration/budget-provider.test.ts",
  "test/integration/breakers.test.ts",
];

export default defineConfig({
  test: {
    globalSetup: ["test/harness/global-setup.ts"],
    allowOnly: false,
    passWithNoTests: false,
    projects: [
      {
        test: {
          name: "rooms",
          include: ["test/**/*.test.ts"],
          exclude: ["test/chaos/**", "test/integration/**", "test/security/**"],
          setupFiles,
          pool: "forks",
          testTimeout: 120_000,
          hookTimeout: 90_000,
          sequence: { groupOrder: 0 },
        },
      },
      {
        test: {
          name: "processes",
          include: ["test/integration/**/*.test.ts", "test/security/**/*.test.ts"],
          exclude: WATCH_THE_CLOCK,
          maxWorkers: 2,
          setupFiles,
          pool: "forks",
          testTimeout: 120_000,
          hookTimeout: 90_000,
          sequence: { groupOrder: 1 },
        },
      },
      {
        test: {
          name: "chaos",
          include: WATCH_THE_CLOCK,
          fileParallelism: false,
          setupFiles,
          pool: "forks",
          testTimeout: 120_000,
          hookTimeout: 90_000,
          sequence: { groupOrder: 2 },
        },
      },
    ],
  },
});
