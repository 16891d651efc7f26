// script: how our scripts read what they were asked for: --help tells it, and what it does not know ends with exit code 2 and a word, not with a trace.
import { Command } from "commander";

/** A command whose options are still to be declared; `.parse().opts()` reads them. `name` is what people type. */
export function script(name: string, summary: string): Command {
  return new Command(name)
    .description(summary)
    .helpOption("--help", "say this")
    .allowExcessArguments(false)
    .exitOverride(({ exitCode }) => process.exit(exitCode === 0 ? 0 : 2));
}
