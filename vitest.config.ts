// vitest.config: two groups of tests. Those of the rooms run side by side; those that kill processes and watch the clock run after
// them, one file at a time, so that neither disturbs the other.
import { defineConfig } from "vitest/config";

const setupFiles = ["test/harness/setup.ts"];

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
          testTimeout: 30_000,
          hookTimeout: 60_000,
          sequence: { groupOrder: 0 },
        },
      },
      {
        test: {
          name: "processes",
          include: ["test/integration/**/*.test.ts", "test/security/**/*.test.ts", "test/chaos/**/*.test.ts"],
          fileParallelism: false,
          setupFiles,
          pool: "forks",
          testTimeout: 120_000,
          hookTimeout: 60_000,
          sequence: { groupOrder: 1 },
        },
      },
    ],
  },
});
