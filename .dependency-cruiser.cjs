// Which room may import which. Each room names the rooms below it; everything else of ours is forbidden to it, sideways too:
// what two rooms of one storey share belongs to the storey below, or is passed as a function.
const BELOW = {
  protocol: [],
  telemetry: ["protocol"],
  "state-machines": ["protocol", "telemetry"],
  bus: ["protocol", "telemetry"],
  providers: ["protocol", "telemetry"],
  actors: ["protocol", "telemetry", "state-machines", "bus", "providers"],
  supervisors: ["protocol", "telemetry", "state-machines", "bus", "providers", "actors"],
  gateway: ["protocol", "telemetry", "state-machines", "bus", "providers", "actors"],
  projections: ["protocol", "telemetry", "state-machines", "bus", "providers", "actors"],
  // The command shows what supervisors and projections hold (`shards`, `verify`); they know nothing of it.
  cli: ["protocol", "telemetry", "state-machines", "bus", "providers", "actors", "supervisors", "projections"],
  deploy: ["protocol"],
  // What main.ts is made of: one file per role of a process. It sees the whole house.
  roles: ["protocol", "telemetry", "state-machines", "bus", "providers", "actors", "supervisors", "gateway", "projections", "cli", "deploy"],
};
const ROOMS = Object.keys(BELOW).join("|");

/** Packages that only one place may know, so that replacing one is a change in one place. */
const OWNED = [
  { name: "nats-only-in-the-bus", package: "(@nats-io|nats)/", owner: "^bus/jetstream[^/]*\\.ts$" },
  { name: "provider-sdks-only-in-providers", package: "(openai|@anthropic-ai|@google/genai)/", owner: "^providers/" },
  { name: "pg-only-in-projections", package: "(pg|node-pg-migrate|kysely)/", owner: "^projections/" },
  { name: "prom-client-only-in-telemetry", package: "(prom-client|@prometheus-io|@opentelemetry|pino)/", owner: "^telemetry/" },
  { name: "xstate-not-above-actors", package: "xstate/", owner: "^(state-machines|actors|cli)/" },
];

module.exports = {
  forbidden: [
    ...Object.entries(BELOW).map(([room, below]) => ({
      name: `${room}-imports-downward`,
      comment: below.length === 0 ? `${room} imports nothing of ours` : `${room} may import ${below.join(", ")}`,
      severity: "error",
      // The launcher runs before anything is installed; it is of deploy/ in all but its place.
      from: { path: `^${room}/`, pathNot: "^cli/troupe\\.mjs$" },
      to: { path: `^(${ROOMS}|test|bench|main\\.ts)(/|$)`, pathNot: `^(${[room, ...below].join("|")})/` },
    })),
    ...OWNED.map(({ name, package: owned, owner }) => ({
      name,
      severity: "error",
      from: { path: `^(${ROOMS}|main\\.ts)(/|$)`, pathNot: owner },
      to: { path: `(^|/)node_modules/${owned}` },
    })),
    { name: "no-cycles", comment: "modules that need each other are one module, or lack a third", severity: "error", from: {}, to: { circular: true } },
    { name: "no-unresolvable", severity: "error", from: {}, to: { couldNotResolve: true } },
    {
      name: "no-dev-packages-in-rooms",
      severity: "error",
      from: { path: `^(${ROOMS}|main\\.ts)(/|$)` },
      to: { dependencyTypes: ["npm-dev"], pathNot: "(^|/)node_modules/@types/" },
    },
  ],
  options: {
    doNotFollow: { path: "node_modules" },
    exclude: { path: "^(coverage|\\.troupe)/" },
    tsPreCompilationDeps: true,
    tsConfig: { fileName: "tsconfig.json" },
    enhancedResolveOptions: { exportsFields: ["exports"], conditionNames: ["import", "node", "default", "types"] },
  },
};
