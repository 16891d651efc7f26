// vitest.config: three groups of tests, one after another. Those of the rooms take all processors; those that start a whole Troupe run three at a
// time, for they mostly wait; those that kill, pause and cut off processes run last, one file at a time, so that none disturbs them.
import { defineConfig } from "vitest/config";
import { BaseSequencer, type TestSpecification } from "vitest/node";

const setupFiles = ["test/harness/setup.ts"];

/** Begun first, so that none of them is the last to run, alone. Vitest would begin with the largest files, on a machine that never ran them. */
const LONG =
  /\/(cluster|budget|budget-windows|budget-crashes|host-crashes|session-lives|projector|crowded-tenant|fair-dispatch|breakers|waits|takeover|command-line|drain)\.test\.ts$/;
class LongOnesFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const sorted = await super.sort(files);
    const isLong = ({ moduleId }: TestSpecification): boolean => LONG.test(moduleId);
    return [...sorted.filter(isLong), ...sorted.filter((file) => !isLong(file))];
  }
}

export default defineConfig({
  test: {
    globalSetup: ["test/harness/global-setup.ts"],
    allowOnly: false,
    passWithNoTests: false,
    sequence: { sequencer: LongOnesFirst },
    projects: [
      {
        test: {
          name: "rooms",
          include: ["test/**/*.test.ts"],
          exclude: ["test/chaos/**", "test/integration/**", "test/security/**"],
          // Vitest's own choice is one processor less than there are: on two, one of them would stand idle.
          maxWorkers: "100%",
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
          maxWorkers: 3,
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
          include: ["test/chaos/**/*.test.ts"],
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
