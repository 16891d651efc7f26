#!/usr/bin/env node
// troupe: the command, on any Node ≥ 20. Hands everything to main.ts under the Node that runs TypeScript; installs what is missing before.
import { launch } from "../deploy/local/bootstrap.mjs";

await launch("main.ts", process.argv.slice(2));
