// mutate: would a test notice if a guard were gone? `npm run mutate [-- NAME…]` breaks one guard after another in a copy of the tree, runs the tests
// that must fail then, and says which survived. Exit code 1 when one did, or when a guard is no longer where this list says.
//
// Never in place: the copy is made in the system's temporary folder, with this tree's packages, and removed at the end.
import { spawnSync } from "node:child_process";
import { cpSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { fileURLToPath } from "node:url";
import { script } from "../../bench/script.ts";

interface Mutation {
  /** The invariant, and what is broken. */
  readonly name: string;
  readonly file: string;
  readonly from: string;
  readonly to: string;
  readonly tests: readonly string[];
}

const CRASHES = "test/actors/host-crashes.test.ts";
const SESSION = "test/state-machines/session.test.ts";
const LOST_ANSWERS = "test/actors/lost-answers.test.ts";
const SUPERVISION = "test/supervisors/supervision.test.ts";
const PLACEMENT_TABLE = "test/supervisors/placement-table.test.ts";
const CONNECTIONS = "test/supervisors/connections.test.ts";
const LEASE = "test/supervisors/lease.test.ts";
const FENCES = "test/actors/fences.test.ts";
const RESTORE = "test/actors/restore.test.ts";
const STEP = "test/state-machines/step.test.ts";
const SIMULATION = "test/simulation/cluster.test.ts";

const MUTATIONS: readonly Mutation[] = [
  {
    name: "A1: answered before the append",
    file: "actors/cell.ts",
    from: "    const [outcome] = await Promise.all([this.#append(data), marked]);",
    to: "    this.#tell(decided, after_sequence);\n    const [outcome] = await Promise.all([this.#append(data), marked]);",
    tests: [CRASHES],
  },
  {
    name: "A2: the fence expects nothing",
    file: "bus/memory.ts",
    from: "append.expected_last_sequence",
    to: "undefined as unknown as number",
    tests: [CRASHES, "test/contract/bus-journals.test.ts"],
  },
  {
    name: "A3: a result stays in the ledger",
    file: "state-machines/step.ts",
    from: "        const running = { ...state.running };\n        delete running[id];\n        const event",
    to: "        const running = { ...state.running };\n        const event",
    tests: [STEP, SESSION],
  },
  {
    name: "A3: what is live is started again",
    file: "actors/effect-runner.ts",
    from: "if (!live.has(inst)) start(effect); // E2",
    to: "start(effect); // E2",
    tests: [CRASHES],
  },
  {
    name: "A5: a snapshot forgets what runs",
    file: "state-machines/step.ts",
    from: "        running: state.running,",
    to: "        running: {},",
    tests: [STEP, SESSION],
  },
  {
    name: "C5: no claim on taking over",
    file: "actors/cell.ts",
    from: "    if (inFlight.length > 0) {",
    to: "    if (inFlight.length > 1000) {",
    tests: [CRASHES],
  },
  {
    name: "C3: no mark before a debt",
    file: "actors/shard-host.ts",
    from: "      mark: () => ensureMark(shard, resident),",
    to: "      mark: () => Promise.resolve(),",
    tests: [CRASHES],
  },
  {
    name: "C3: the world does not wait for the mark",
    file: "actors/cell.ts",
    from: "await Promise.all([this.#append(data), marked]);",
    to: "await Promise.all([this.#append(data)]);",
    tests: [SIMULATION],
  },
  {
    name: "C6: what cannot be judged is answered away",
    file: "actors/judge.ts",
    from: '{ kind: "unjudged", error, tries: this.#unjudged++ }',
    to: 'no(errorBody("unavailable", "it cannot be judged"))',
    tests: [LOST_ANSWERS],
  },
  {
    name: "W1: a late no of the fast lane counts",
    file: "actors/client.ts",
    from: "(fast && asked.durable && !reply.ok)",
    to: "false",
    tests: [LOST_ANSWERS],
  },
  {
    name: "D3: leases that could not be renewed are judged",
    file: "supervisors/calm.ts",
    from: "now_ms - this.#leases_since_ms >= this.#options.ttl_ms",
    to: "true",
    tests: [SUPERVISION],
  },
  {
    name: "F4: the first of what follows is waited for without an end",
    file: "gateway/session-feed.ts",
    from: "let waits_for_first = expected;",
    to: "let waits_for_first = false;",
    tests: ["test/gateway/session-feed.test.ts"],
  },
  {
    name: "H2: marked actors are not restored",
    file: "actors/shard-host.ts",
    from: "        if (resident !== undefined) await Promise.race([resident.cell.read(), pause(world, RESTORE_PATIENCE_MS)]);\n",
    to: "",
    tests: [CRASHES],
  },
  {
    name: "B1: what others hold counts as free",
    file: "state-machines/budget-decision.ts",
    from: "limit_usd_micros - settled_usd_micros - reserved_usd_micros;",
    to: "limit_usd_micros - settled_usd_micros;",
    tests: ["test/state-machines/budget-decision.test.ts"],
  },
  {
    name: "S3: a finished actor keeps its timers",
    file: "state-machines/step.ts",
    from: "timers: over ? {} : state.timers",
    to: "timers: state.timers",
    tests: [STEP, SESSION],
  },
  {
    name: "keys are not remembered",
    file: "state-machines/step.ts",
    from: "if (known.hash !== identity.hash)",
    to: "if (known.hash === identity.hash)",
    tests: [STEP],
  },
  {
    name: "recovery is never exhausted",
    file: "state-machines/step.ts",
    from: "spent.tries >= RECOVERY_TRIES_MAX",
    to: "spent.tries >= 1e9",
    tests: [SESSION],
  },
  {
    name: "L1: a lease lasts from its answer",
    file: "supervisors/lease.ts",
    from: "valid_until_ms: sent_ms + this.#ttl_ms",
    to: "valid_until_ms: this.#options.world.monotonic_ms() + 2 * this.#ttl_ms",
    tests: [LEASE],
  },
  {
    name: "L4: a name is taken whatever its holder did since",
    file: "supervisors/lease.ts",
    from: "const written = await this.#options.bucket.update(this.#options.key, value, revision);",
    to: "const written = await this.#options.bucket.update(this.#options.key, value, (await this.#options.bucket.get(this.#options.key))?.revision ?? revision);",
    tests: [LEASE],
  },
  {
    name: "U1: a leader is succeeded right after an outage",
    file: "supervisors/succession.ts",
    from: "    if (!this.#options.may_judge()) return undefined; // U1\n",
    to: "",
    tests: ["test/supervisors/succession.test.ts"],
  },
  {
    name: "U2: a leader that answers is succeeded",
    file: "supervisors/succession.ts",
    from: "if (answer !== undefined || ",
    to: "if (",
    tests: ["test/supervisors/succession.test.ts"],
  },
  {
    name: "C2: an owner goes on over a journal of a later epoch",
    file: "actors/cell.ts",
    from: "if (restored !== undefined && restored.last.epoch > this.#deps.epoch && (await this.#lost())) return false;",
    to: "",
    tests: [FENCES],
  },
  {
    name: "C4: what a fence refused is forgotten",
    file: "actors/cell.ts",
    from: "      this.#mailbox.put_back(...taken); // C4: decided anew against the journal as it is\n",
    to: "",
    tests: [FENCES],
  },
  {
    name: "C8: an unjournaled refusal is told before it is settled",
    file: "actors/cell.ts",
    from: "if (await item.settle()) this.#tell([",
    to: "void item.settle();\n        this.#tell([",
    tests: [LOST_ANSWERS],
  },
  {
    name: "C8: what was said after it does not wait",
    file: "actors/shard-host.ts",
    from: "    startOver(shard);\n    return false;",
    to: "    return false;",
    tests: [LOST_ANSWERS, "test/contract/bus-faults.test.ts"],
  },
  {
    name: "H1: an actor has two cells",
    file: "actors/shard-host.ts",
    from: "    if (present !== undefined) return present; // H1\n",
    to: "",
    tests: [CRASHES],
  },
  {
    name: "H3: a clearing whose answer was lost leaves a mark",
    file: "actors/shard-host.ts",
    from: 'outcome.kind === "unavailable" ? { kind: "doubtful", sequence } : { kind: "none" };',
    to: 'outcome.kind === "unavailable" ? { kind: "set", sequence } : { kind: "none" };',
    tests: [LOST_ANSWERS],
  },
  {
    name: "H5: who lost the shard tells all the same",
    file: "actors/shard-host.ts",
    from: 'if (await delivery.settle()) return (await deps.on_conflict(shard.number, shard.epoch)) === "mine";',
    to: "if (await delivery.settle()) return true;",
    tests: [LOST_ANSWERS],
  },
  {
    name: "E3: a result is posted after the ledger let go of it",
    file: "actors/effect-runner.ts",
    from: "if (stopped || abort.signal.aborted) return; // E3",
    to: "if (stopped) return; // E3",
    tests: ["test/actors/effect-runner.test.ts"],
  },
  {
    name: "E4: what is stopped is heard again",
    file: "actors/effect-runner.ts",
    from: "      mine.settled = true; // It stays known until the ledger no longer names it: E2.\n      mine.abort.abort();\n",
    to: "",
    tests: ["test/actors/effect-runner.test.ts"],
  },
  {
    name: "R1: a replay that ends elsewhere is believed",
    file: "actors/restore.ts",
    from: "assert(outerState(current.snapshot) === message.state,",
    to: "assert(true,",
    tests: [RESTORE],
  },
  {
    name: "R2: a snapshot that cannot be read stops the actor",
    file: "actors/restore.ts",
    from: '      log.warn("snapshot left aside, replaying the whole journal"',
    to: '      throw error;\n      log.warn("snapshot left aside, replaying the whole journal"',
    tests: [RESTORE],
  },
  {
    name: "R1: what is prepared is taken for all there is",
    file: "actors/restore.ts",
    from: 'bus.read("EVENTS", actorSubject(actor, "event"), last_sequence + 1)',
    to: 'bus.read("EVENTS", actorSubject(actor, "event"), from === undefined ? last_sequence + 1 : Number.MAX_SAFE_INTEGER)',
    tests: ["test/actors/warm-actors.test.ts"],
  },
  {
    name: "A4: a snapshot of another is taken",
    file: "actors/restore.ts",
    from: '      assert(actorPath(snapshot.saved.actor) === actorPath(actor), "A4: a snapshot keeps the actor of its subject");\n',
    to: "",
    tests: [RESTORE],
  },
  {
    name: "A4: a message leaves for another tenant",
    file: "actors/cell.ts",
    from: 'message.to.startsWith(`${actor.tenant}/`) || message.to.startsWith("system/")',
    to: "true",
    tests: [FENCES],
  },
  {
    name: "A4: an answer goes to another tenant's inbox",
    file: "protocol/subjects.ts",
    from: "  return subject.startsWith(tenantInboxPrefix(tenant)) || (said_by",
    to: '  return subject.startsWith("_INBOX") || (said_by',
    tests: [FENCES],
  },
  {
    name: "A4: a tenant's client says who it is",
    file: "actors/shard-host.ts",
    from: "isFromEdge(subject) ? PRINCIPAL_ON_BUS : headerOf(headers, HEADER_PRINCIPAL)",
    to: "headerOf(headers, HEADER_PRINCIPAL)",
    tests: [FENCES],
  },
  {
    name: "A6: a draining worker waits for nothing",
    file: "state-machines/worker.ts",
    from: "        return `waits until ${shards} have moved away`;",
    to: "        return undefined;",
    tests: ["test/state-machines/worker.test.ts"],
  },
  {
    name: "S2: a result that nobody awaits is an entry",
    file: "state-machines/step.ts",
    from: "        if (id === undefined) return nothing; // S2\n",
    to: "",
    tests: [STEP],
  },
  {
    name: "S6: a lost attempt keeps its count",
    file: "state-machines/step.ts",
    from: "...anew, ...knows, attempt: effect.attempt + 1",
    to: "...anew, ...knows, attempt: effect.attempt",
    tests: [STEP, SESSION],
  },
  {
    name: "D1: the table changes without the journal",
    file: "supervisors/assignments.ts",
    from: 'const outcome = await journals.say(worker, "shard.assign", { shard, epoch, from, reason }); // D1\n      if (outcome?.ok !== true) return;\n',
    to: 'await journals.say(worker, "shard.assign", { shard, epoch, from, reason });\n',
    tests: [SUPERVISION],
  },
  {
    name: "D2: a table write over another's",
    file: "supervisors/placement-table.ts",
    from: "await this.#bucket.update(key, value, over.revision);",
    to: "await this.#bucket.update(key, value, (await this.#bucket.get(key))?.revision ?? 0);",
    tests: [SUPERVISION],
  },
  {
    name: "D2: a table write that nobody answered counts as one that did not happen",
    file: "supervisors/placement-table.ts",
    from: "      this.#doubtful.add(shard);\n",
    to: "",
    tests: [PLACEMENT_TABLE, SUPERVISION],
  },
  {
    name: "D3: a worker that answers is judged by its connections",
    file: "supervisors/verdicts.ts",
    from: "if (answer.ok || !calm.may_judge()",
    to: "if (!calm.may_judge()",
    tests: [CONNECTIONS],
  },
  {
    name: "D3: the watch is believed, and the lease not read",
    file: "supervisors/verdicts.ts",
    from: "    if (read.entry !== undefined) {\n      this.#heard(read.entry);",
    to: '    if (read.entry !== undefined && read.entry.key === "") {\n      this.#heard(read.entry);',
    tests: [SUPERVISION],
  },
  {
    name: "D3: an outage of our own is not counted",
    file: "supervisors/leader.ts",
    from: '    if (event.kind === "reset") this.#calm.outage(); // D3\n',
    to: "",
    tests: [CONNECTIONS],
  },
  {
    name: "D4: a leader decides after its lease",
    file: "supervisors/term.ts",
    from: "return !this.#over && this.#options.lease.is_valid(); // D4",
    to: "return !this.#over;",
    tests: [SUPERVISION],
  },
  {
    name: "D5: a pass that hangs keeps the lead",
    file: "supervisors/leadership.ts",
    from: "now_ms - this.#passing_since_ms >= PASS_PATIENCE_MS",
    to: "now_ms < 0",
    tests: [SUPERVISION],
  },
  {
    name: "W3: a life that is over is told to join again",
    file: "supervisors/verdicts.ts",
    from: "record !== undefined && !isAlive(record.state) && record.incarnation === lease.incarnation",
    to: 'record?.state === "dead" && record.incarnation === lease.incarnation',
    tests: [SUPERVISION],
  },
  {
    name: "K1: what the broker ended counts",
    file: "supervisors/connections.ts",
    from: '    if (event.by === "broker") return UNKNOWN; // K1\n',
    to: "",
    tests: [CONNECTIONS],
  },
  {
    name: "K2: the end of a replaced connection counts",
    file: "supervisors/connections.ts",
    from: "before.client_id !== event.client_id",
    to: "false",
    tests: [CONNECTIONS],
  },
  {
    name: "K3: what was known before an outage counts after it",
    file: "supervisors/connections.ts",
    from: "      this.#processes.clear(); // K3\n",
    to: "",
    tests: [CONNECTIONS],
  },
  {
    name: "L3: a renewal that was found counts from now",
    file: "supervisors/lease.ts",
    from: "before.unsure_since_ms ?? before.valid_until_ms - this.#ttl_ms",
    to: "this.#options.world.monotonic_ms()",
    tests: [LEASE],
  },
  {
    name: "M1: a worker acts after its lease",
    file: "supervisors/member.ts",
    from: 'return this.#phase.kind === "present" && this.#lease.is_valid();',
    to: 'return this.#phase.kind === "present";',
    tests: [SUPERVISION],
  },
  {
    name: "M3: a shard that was left is taken again",
    file: "supervisors/member.ts",
    from: "if (going || this.#left.get(shard) === entry.epoch) return",
    to: "if (going) return",
    tests: [SUPERVISION],
  },
  {
    name: "M3: an entry of another life of ours is taken",
    file: "supervisors/member.ts",
    from: "entry.worker === this.#options.id && entry.incarnation === this.#incarnation &&",
    to: "entry.worker === this.#options.id &&",
    tests: [SUPERVISION],
  },
  {
    name: "M4: after an outage the table is not read",
    file: "supervisors/member.ts",
    from: "    for (const entry of entries) this.#apply(entry);\n",
    to: "",
    tests: [SUPERVISION],
  },
  {
    name: "P1: shards go to who is not ready",
    file: "supervisors/placement.ts",
    from: "new Set(eligible.map((worker) => worker.id)); // P1",
    to: "new Set(input.workers.map((worker) => worker.id)); // P1",
    tests: ["test/supervisors/placement.test.ts"],
  },
  {
    name: "P3: two differ by two and nothing moves",
    file: "supervisors/placement.ts",
    from: "fullest.count - emptiest.count <= 1",
    to: "fullest.count - emptiest.count <= 2",
    tests: ["test/supervisors/placement.test.ts"],
  },
  {
    name: "P4: an epoch that was only said is given again",
    file: "supervisors/placement.ts",
    from: "Math.max(entry?.epoch ?? 0, input.epochs.get(shard) ?? 0) + 1; // P4",
    to: "(entry?.epoch ?? 0) + 1; // P4",
    tests: ["test/supervisors/placement.test.ts"],
  },
  {
    name: "N2: who does not own an actor starts it",
    file: "supervisors/host-service.ts",
    from: "if (!(await host.load(actor))) return no(",
    to: 'await host.load(actor);\n      if (path === "") return no(',
    tests: ["test/supervisors/host-service.test.ts"],
  },
  {
    name: "W1: a shard is assigned under an epoch it had",
    file: "state-machines/worker.ts",
    from: "  return epoch > highest\n",
    to: "  return epoch > 0\n",
    tests: ["test/state-machines/worker.test.ts"],
  },
  {
    name: "W3: a dead life joins again",
    file: "state-machines/worker.ts",
    from: "body.incarnation !== context.incarnation) return undefined;",
    to: 'body.incarnation !== "") return undefined;',
    tests: ["test/state-machines/worker.test.ts"],
  },
  {
    name: "B1: more is granted than there is",
    file: "state-machines/budget-holds.ts",
    from: "Math.min(asked, Math.max(room, 0)); // B1",
    to: "asked; // B1",
    tests: ["test/state-machines/budget.test.ts"],
  },
  {
    name: "B4: an attempt that ended reserves again",
    file: "state-machines/budget-holds.ts",
    from: "open === undefined ? this.#isClosed(hold) : part < open.part",
    to: "open === undefined ? false : part < open.part",
    tests: ["test/state-machines/budget.test.ts"],
  },
  {
    name: "K3 of the gateway: a revoked key opens",
    file: "gateway/authenticate.ts",
    from: " || known.revoked_at_ms !== null) return UNAUTHENTICATED; // K3",
    to: ") return UNAUTHENTICATED; // K3",
    tests: ["test/gateway/authenticate.test.ts"],
  },
  {
    name: "A4: a message of another's journal is believed",
    file: "protocol/journal.ts",
    from: '  if (actor) assert(actorPath(message.actor) === actorPath(actor), "A4: a journal message keeps the actor of its subject");\n',
    to: "",
    tests: [RESTORE],
  },
  {
    name: "a planned move does not wait until its target is prepared",
    file: "supervisors/assignments.ts",
    from: "if (target === undefined || !this.#preparations.ready(shard, to, target.incarnation)) return;",
    to: "",
    tests: [SUPERVISION],
  },
  {
    name: "A3: a message that was decided by its place is decided again",
    file: "state-machines/step.ts",
    from: "if (mark !== undefined && source.seq <= mark) {",
    to: "if (mark !== undefined && source.seq < 0) {",
    tests: ["test/actors/lost-answers.test.ts", STEP],
  },
  {
    name: "A3: an effect reaches out without looking again",
    file: "actors/effect-scope.ts",
    from: "permitted: async () => (await host.permitted()) && !signal.aborted,",
    to: "permitted: () => Promise.resolve(true),",
    tests: [LOST_ANSWERS],
  },
  {
    name: "C7: a former owner's schedule is stored over the owner's",
    file: "bus/memory.ts",
    from: "timerSubject(actor), data, headers, expected_last_sequence, REQUEST_PATIENCE_MS",
    to: "timerSubject(actor), data, headers, undefined, REQUEST_PATIENCE_MS",
    tests: [LOST_ANSWERS],
  },
  {
    name: "the fast lane's copy of what was refused is done",
    file: "actors/shard-host.ts",
    from: "late: () => refused_durably.has_twin(reply)",
    to: "late: () => false",
    tests: [LOST_ANSWERS],
  },
  {
    name: "P1: a leaving worker is given back what it released",
    file: "supervisors/placement.ts",
    from: 'entry?.worker !== "" || entry.from !== id',
    to: "entry === undefined || true || entry.from !== id",
    tests: ["test/supervisors/placement.test.ts"],
  },
  {
    name: "A2: a rival's message is taken for one's own (G3)",
    file: "bus/fence.ts",
    from: "headerOf(next.headers, HEADER_COMMIT) === append.commit_id;",
    to: "headerOf(next.headers, HEADER_COMMIT) !== undefined;",
    tests: [FENCES],
  },
  {
    name: "A2: one's own message is taken for a rival's (G3)",
    file: "bus/fence.ts",
    from: "headerOf(next.headers, HEADER_COMMIT) === append.commit_id;",
    to: 'headerOf(next.headers, HEADER_COMMIT) === "";',
    tests: ["test/contract/bus-faults.test.ts"],
  },
  {
    name: "S5: the end of a lost attempt owes nothing",
    file: "state-machines/step.ts",
    from: 'if (lost) end(effect, { kind: "lost" });\n      else if (gone && entry.t === "done"',
    to: 'if (gone && entry.t === "done"',
    tests: [STEP, "test/state-machines/session-model-calls.test.ts"],
  },
  {
    name: "M5: a shard that is lost while it is taken or left is not interrupted",
    file: "supervisors/member.ts",
    from: "    if (lost) void this.#drop(shard);\n",
    to: "",
    tests: [SUPERVISION],
  },
  {
    name: "M3: a shard is taken without a valid lease",
    file: "supervisors/member.ts",
    from: 'return this.#lease.is_valid() ? { kind: "take", entry } : { kind: "rest" };',
    to: 'return { kind: "take", entry };',
    tests: [SUPERVISION, SIMULATION],
  },
  {
    name: "O1: an older entry of the table is believed",
    file: "supervisors/locations.ts",
    from: "    if (before !== undefined && (entry === undefined ? revision < before.revision : revision <= before.revision)) return;\n",
    to: "",
    tests: ["test/supervisors/locations.test.ts"],
  },
  {
    name: "A4: history is sent to a stranger's inbox (P2)",
    file: "gateway/replay.ts",
    from: " || !isReplayReplyAllowed(tenant, reply)) {",
    to: ") {",
    tests: ["test/gateway/replay.test.ts"],
  },
  {
    name: "A4: the body names whose history it is (P1)",
    file: "gateway/replay.ts",
    from: "const actor: ActorAddress = { tenant, kind: asked.kind, id: asked.id }; // P1",
    to: 'const actor: ActorAddress = { tenant: "globex", kind: asked.kind, id: asked.id }; // P1',
    tests: ["test/gateway/replay.test.ts"],
  },
  {
    name: "T1: a key's id is given again",
    file: "state-machines/tenant.ts",
    from: "if (Object.hasOwn(context.keys, key_id)) return errorBody(",
    to: 'if (key_id === "") return errorBody(',
    tests: ["test/state-machines/tenant.test.ts"],
  },
  {
    name: "CP2: a place is given back twice",
    file: "actors/call-pool.ts",
    from: "      if (left) return; // CP2\n",
    to: "",
    tests: ["test/actors/call-pool.test.ts"],
  },
  {
    name: "MR1: after the first piece another model is asked",
    file: "actors/model-routing.ts",
    from: "      if (delivered) return failedRoute(error, model); // MR1\n",
    to: "",
    tests: ["test/actors/model-routing.test.ts"],
  },
  {
    name: "L1: a lease that ended is valid",
    file: "supervisors/lease.ts",
    from: "this.#options.world.monotonic_ms() < this.#holding.valid_until_ms",
    to: "this.#holding.valid_until_ms > 0",
    tests: [LEASE],
  },
  {
    name: "G2: who has no configuration may do everything",
    file: "actors/permission.ts",
    from: "      if (frozen === undefined) return refuse(",
    to: "      if (frozen === undefined) return;\n      if (input === undefined) return refuse(",
    tests: ["test/actors/permission.test.ts"],
  },
  {
    name: "G3: what is denied is done",
    file: "actors/permission.ts",
    from: 'if (verdict.kind === "denied") return refuse(verdict.message);',
    to: "",
    tests: ["test/actors/permission.test.ts"],
  },
  {
    name: "A6: a paused session waits for nothing",
    file: "state-machines/session-waits.ts",
    from: "      return `paused${because}: waits for session.resume${halfway}${waiting(queue.length)}`;",
    to: "      return undefined;",
    tests: [SESSION],
  },
  {
    name: "M3 of the feed: a chunk of an older attempt is given",
    file: "gateway/feed-merge.ts",
    from: "      if (isVoid(chunk)) return [];\n",
    to: "",
    tests: ["test/gateway/feed-merge.test.ts"],
  },
  {
    name: "W2: a shard is released under an epoch it is not held under",
    file: "state-machines/worker.ts",
    from: "return held === epoch ? undefined :",
    to: "return held !== undefined ? undefined :",
    tests: ["test/state-machines/worker.test.ts"],
  },
  {
    name: "C5 of an inbox: what a later opening delivered again is settled by the earlier one",
    file: "bus/memory.ts",
    from: "const answer = (): void => (same() ? resolve(true) : unsure());",
    to: "const answer = (): void => resolve(true);",
    tests: ["test/contract/bus-faults.test.ts", "test/actors/lost-answers.test.ts"],
  },
  {
    name: "B1 of slots: one more call runs than may",
    file: "state-machines/budget-line.ts",
    from: "    if (free > ahead) {",
    to: "    if (free >= ahead) {",
    tests: [SIMULATION],
  },
  {
    name: "B2: who has head-room is refused",
    file: "state-machines/budget-decision.ts",
    from: "headroom(inputs) < minimum_usd_micros)",
    to: "headroom(inputs) < 2 * minimum_usd_micros)",
    tests: [SIMULATION],
  },
  {
    name: "B3: what nobody knew the cost of stays reserved",
    file: "state-machines/budget-holds.ts",
    from: "this.#levels.add(open.levels, cost, -amount_usd_micros);",
    to: "this.#levels.add(open.levels, cost, assumed ? 0 : -amount_usd_micros);",
    tests: [SIMULATION],
  },
  {
    name: "MM5: something is reserved before the budget is there",
    file: "actors/model-money.ts",
    from: "const is_known = known.has(tenant);",
    to: "const is_known = tries === 0 || known.has(tenant);",
    tests: ["test/actors/budget-money.test.ts"],
  },
  {
    name: "MW1: a call that waits does not say so",
    file: "actors/call-account.ts",
    from: "        told = true;\n        tell({ wait:",
    to: "        if (told) tell({ wait:",
    tests: [SIMULATION],
  },
  {
    name: "P2 of rows: another position than the table's is believed",
    file: "projections/projector.ts",
    from: "if (row === undefined || row.position !== expected) return",
    to: "if (row === undefined) return",
    tests: [SIMULATION],
  },
  {
    name: "P1 of rows: the position is not moved with them",
    file: "projections/projector.ts",
    from: "await transaction.moveTo({ position: end, incarnation }); // P1",
    to: "if (decoded.length < 3) await transaction.moveTo({ position: end, incarnation }); // P1",
    tests: [SIMULATION],
  },
  {
    name: "R3 of rows: what nobody knew costs nothing",
    file: "projections/rows.ts",
    from: "const rest = row === takes_rest ?",
    to: "const rest = row === takes_rest && row.try > 1 ?",
    tests: [SIMULATION],
  },
];

const root = fileURLToPath(new URL("../..", import.meta.url));
const command = script(
  "npm run mutate --",
  "Takes one guard after another out of a copy of the program, and sees that a test notices. Exit code 1 when one survives.",
)
  .argument("[part...]", "only mutations with one of these in their name")
  .option("--list", "say their names, and do nothing")
  .parse();
const asked = command.args;
const chosen = MUTATIONS.filter(({ name }) => asked.length === 0 || asked.some((part) => name.includes(part)));
if (command.opts<{ list?: true }>().list) {
  for (const { name, file } of chosen) console.log(`${name}  (${file})`);
  process.exit(0);
}
if (chosen.length === 0) {
  console.error(`no mutation's name has ${asked.join(" or ")} in it; --list says their names`);
  process.exit(2);
}
const copy = mkdtempSync(join(tmpdir(), "troupe-mutate-"));
let survivors = 0;
try {
  cpSync(root, copy, { recursive: true, filter: (path) => !["node_modules", ".git", ".troupe"].includes(basename(path)) });
  symlinkSync(join(root, "node_modules"), join(copy, "node_modules"));
  writeFileSync(join(copy, "mutate.config.ts"), `export default { test: { pool: "forks", bail: 1, testTimeout: 120_000 } };\n`);
  for (const { name, file, from, to, tests } of chosen) {
    const path = join(copy, file);
    const text = readFileSync(path, "utf8");
    if (text.split(from).length !== 2) {
      survivors++;
      console.log(`✗ ${name}: the guard is not where it was, once, in ${file}`);
      continue;
    }
    writeFileSync(path, text.replace(from, to));
    const run = spawnSync(process.execPath, [join(root, "node_modules/vitest/vitest.mjs"), "run", "--config", "mutate.config.ts", ...tests], {
      cwd: copy,
      encoding: "utf8",
      timeout: 300_000,
      env: { ...process.env, MUTATED: "1" },
    });
    writeFileSync(path, text);
    const caught = run.status !== 0;
    if (!caught) survivors++;
    console.log(`${caught ? "✓" : "✗"} ${name}${caught ? "" : ": survived"}`);
  }
} finally {
  rmSync(copy, { recursive: true, force: true });
}
console.log(`${chosen.length - survivors} of ${chosen.length} caught`);
process.exitCode = survivors === 0 ? 0 : 1;
