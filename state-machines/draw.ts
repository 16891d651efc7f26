// draw: pictures of the machines, out of the machines. docs/machines/ holds them; a test keeps them current.
//
// One walk gives a picture: states with what they are, and edges, those between the same two states run together. Mermaid and DOT are two
// ways to write it down; the SVG is the DOT drawn by Graphviz (WebAssembly, no browser, no service).
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { instance } from "@viz-js/viz";
import type { AnyStateMachine, AnyStateNode } from "xstate";
import { definitions } from "./kinds.ts";

interface DrawnState {
  readonly name: string;
  /** `works` has an effect in flight; `passing` never rests. */
  readonly kind: "works" | "waits" | "passing" | "final";
  /** One line under the name. */
  readonly says: string | undefined;
  readonly group: string | undefined;
  /** What it takes without leaving. */
  readonly stays_on: readonly string[];
}

interface DrawnEdge {
  /** undefined: from every state. */
  readonly from: string | undefined;
  /** From every state of this group; `from` is one of them. */
  readonly from_group?: string;
  readonly to: string;
  readonly labels: readonly string[];
}

interface Picture {
  readonly name: string;
  readonly initial: string;
  readonly created_by: string;
  readonly states: readonly DrawnState[];
  readonly edges: readonly DrawnEdge[];
  /** What every state takes without leaving. */
  readonly everywhere: readonly string[];
}

const readable = (name: string): string => name.replaceAll("_", " ");

/** Some of XState's transition definition, as far as it is drawn. */
interface TransitionShape {
  readonly eventType: string;
  readonly guard?: unknown;
  readonly delay?: string | number | undefined;
  readonly target: readonly AnyStateNode[] | undefined;
}

/** `model done [calls tools]`, `session.pause`, `after idle ttl`, `[turn open]`, `else`. */
function labelOf({ eventType, guard, delay }: TransitionShape, alone: boolean): string {
  const guardName = guard === undefined ? undefined : typeof guard === "string" ? guard : ((guard as { type?: string }).type ?? "guard");
  const condition = guardName === undefined ? "" : `[${readable(guardName)}]`;
  if (eventType === "") return condition === "" ? (alone ? "" : "[else]") : condition;
  const result = /^xstate\.(done|error)\.actor\.(.*)$/.exec(eventType);
  const event =
    delay === undefined ? (result === null ? eventType : `${result[2]} ${result[1] === "done" ? "done" : "failed"}`) : `after ${readable(String(delay))}`;
  return condition === "" ? event : `${event} ${condition}`;
}

/** A state's own, and those of the states within it: to a reader it is one state. */
const transitionsOf = (node: AnyStateNode): TransitionShape[] => [
  ...([...[...node.transitions.values()].flat(), ...(node.always ?? [])] as unknown as TransitionShape[]),
  ...(node.parent === undefined ? [] : (Object.values(node.states) as AnyStateNode[]).flatMap(transitionsOf)),
];

/** The outer state that a state is, or is within. */
function outerOf(node: AnyStateNode): AnyStateNode {
  const { parent } = node as { parent?: AnyStateNode };
  return parent?.parent === undefined ? node : outerOf(parent);
}

function stateOf(node: AnyStateNode): DrawnState {
  const waits_on_effects = transitionsOf(node).some(({ eventType }) => eventType.startsWith("xstate.done.actor."));
  const kind = node.type === "final" ? "final" : waits_on_effects ? "works" : (node.always?.length ?? 0) > 0 ? "passing" : "waits";
  const stays = transitionsOf(node).filter(({ target, eventType, delay }) => target === undefined && delay === undefined && !eventType.startsWith("xstate."));
  return {
    name: node.key,
    kind,
    says: node.description,
    group: (node.meta as { group?: string } | undefined)?.group,
    stays_on: [...new Set(stays.map(({ eventType }) => eventType))],
  };
}

function edgesOf(node: AnyStateNode, from: string | undefined): DrawnEdge[] {
  const byTarget = new Map<string, string[]>();
  for (const transition of transitionsOf(node)) {
    // A passing state that decides once more is no news to a reader.
    for (const target of (transition.target ?? []).map(outerOf)) {
      if (target.key === from) continue;
      const labels = byTarget.get(target.key) ?? [];
      byTarget.set(target.key, [...labels, labelOf(transition, (node.always?.length ?? 0) <= 1)]);
    }
  }
  return [...byTarget].map(([to, labels]) => ({ from, to, labels: [...new Set(labels)].filter((label) => label !== "") }));
}

/** The outer states are what a reader sees; what is within one is its own affair. */
function pictureOf(machine: AnyStateMachine, created_by: string): Picture {
  const { root } = machine;
  const nodes = Object.values(root.states) as AnyStateNode[];
  return {
    name: machine.id,
    initial: (root.initial.target?.[0] as AnyStateNode | undefined)?.key ?? nodes[0]?.key ?? "",
    created_by,
    states: nodes.map(stateOf),
    edges: [...nodes.flatMap((node) => edgesOf(node, node.key)), ...edgesOf(root, undefined)],
    everywhere: transitionsOf(root)
      .filter(({ target }) => target === undefined)
      .map(({ eventType }) => eventType),
  };
}

/** Text for Mermaid's `stateDiagram-v2`, which GitHub draws. */
export function toMermaid(machine: AnyStateMachine, created_by: string): string {
  const picture = pictureOf(machine, created_by);
  const plain = (label: string): string => label.replaceAll(/[:;#]/g, " ");
  const lines = ["stateDiagram-v2", `  [*] --> ${picture.initial} : ${picture.created_by}`];
  for (const { name, kind, says } of picture.states) {
    if (kind === "passing") lines.push(`  state ${name} <<choice>>`);
    else if (says !== undefined) lines.push(`  ${name} : ${plain(name)} - ${plain(says)}`);
    if (kind === "final") lines.push(`  ${name} --> [*]`);
  }
  for (const { from, to, labels } of picture.edges) {
    if (from === undefined) continue;
    lines.push(`  ${from} --> ${to}${labels.length === 0 ? "" : ` : ${labels.map(plain).join(", ")}`}`);
  }
  const anywhere = picture.edges.filter(({ from }) => from === undefined).map(({ to, labels }) => `${labels.join(", ")} leads to ${to}`);
  if (picture.everywhere.length > 0) anywhere.push(`${picture.everywhere.join(", ")}: taken`);
  if (anywhere.length > 0) lines.push(`  note right of ${picture.initial}`, `    in every state: ${plain(anywhere.join("; "))}`, "  end note");
  return `${lines.join("\n")}\n`;
}

const FILL = { works: "#fff3d6", waits: "#ffffff", passing: "#e8edf3", final: "#eceff1" } as const;
/** The one sans-serif whose widths Graphviz knows. */
const FONT = "Helvetica";
const quoted = (text: string): string => JSON.stringify(text);
const escaped = (text: string): string => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function nodeDot({ name, kind, says, stays_on }: DrawnState): string {
  if (kind === "passing")
    return `${quoted(name)} [shape=diamond style=filled fillcolor="${FILL.passing}" label="what next?" fontsize=10 margin=0.02 width=1.3 height=0.7];`;
  const lines = [`<b>${escaped(readable(name))}</b>`];
  if (says !== undefined) lines.push(`<font point-size="10" color="#445566">${escaped(says)}</font>`);
  if (stays_on.length > 0) lines.push(`<font point-size="9" color="#66727d">takes ${escaped(stays_on.join(", "))}</font>`);
  return `${quoted(name)} [label=<${lines.join("<br/>")}> fillcolor="${FILL[kind]}"${kind === "final" ? " peripheries=2" : ""}];`;
}

/** What all states of a group do alike is one edge from the group. */
function joined(picture: Picture): readonly DrawnEdge[] {
  const groups = Map.groupBy(picture.states, ({ group }) => group);
  let { edges } = picture;
  for (const [group, states] of groups) {
    if (group === undefined || states.length < 2) continue;
    const names = states.map(({ name }) => name);
    const outward = edges.filter(({ from, to }) => from !== undefined && names.includes(from) && !names.includes(to));
    for (const to of new Set(outward.map((edge) => edge.to))) {
      const [first, ...others] = names.map((name) => outward.find((edge) => edge.from === name && edge.to === to)?.labels ?? []);
      const shared = (first ?? []).filter((label) => others.every((labels) => labels.includes(label)));
      if (shared.length === 0) continue;
      const rest = edges
        .map((edge) => (edge.to === to && names.includes(edge.from ?? "") ? { ...edge, labels: edge.labels.filter((label) => !shared.includes(label)) } : edge))
        .filter(({ from, labels }) => !names.includes(from ?? "") || labels.length > 0);
      edges = [...rest, { from: names[Math.floor(names.length / 2)], from_group: group, to, labels: shared }];
    }
  }
  return edges;
}

/** Each way out of every state begins at a sign of its own, so that the sign stands where the way leads. */
const anyDot = (to: string): string => `·any ${to}`;

function edgeDot({ from, from_group, to, labels }: DrawnEdge, own: string, initial: string): string {
  // `session.pause` is `pause` in the picture of a session.
  const label = labels.map((text) => ` ${text.startsWith(own) ? text.slice(own.length) : text} `).join("\n");
  const tail = from_group === undefined ? "" : ` ltail=${quoted(`cluster_${from_group}`)}`;
  // A way back to the beginning does not pull the beginning down.
  const back = to === initial ? " constraint=false" : "";
  return `${quoted(from ?? anyDot(to))} -> ${quoted(to)} [label=${quoted(label)}${tail}${back}];`;
}

/** Text for Graphviz. */
export function toDot(machine: AnyStateMachine, created_by: string): string {
  const picture = pictureOf(machine, created_by);
  const own = `${picture.name}.`;
  const short = (command: string): string => (command.startsWith(own) ? command.slice(own.length) : command);
  const lines = [
    `digraph ${quoted(picture.name)} {`,
    `compound=true; newrank=true; rankdir=TB; ranksep=0.55; nodesep=0.6; bgcolor="white"; pad=0.2; fontname="${FONT}";`,
    `node [shape=box style="rounded,filled" fontname="${FONT}" fontsize=13 margin="0.28,0.1" color="#5b6b7a"];`,
    `edge [fontname="${FONT}" fontsize=10 arrowsize=0.7 color="#5b6b7a" fontcolor="#223344"];`,
    `"·begin" [shape=point width=0.12];`,
    `"·begin" -> ${quoted(picture.initial)} [label=${quoted(`  ${short(picture.created_by)}`)}];`,
  ];
  for (const [group, states] of Map.groupBy(picture.states, (state) => state.group)) {
    const nodes = states.map((state) => nodeDot({ ...state, stays_on: state.stays_on.map(short) }));
    if (group === undefined) lines.push(...nodes);
    else
      lines.push(
        `subgraph ${quoted(`cluster_${group}`)} { label=${quoted(group)}; labeljust=l; fontsize=11; fontcolor="#667788"; style="rounded"; color="#c3ccd5"; bgcolor="#f4f7fa"; margin=14;`,
        ...nodes,
        "}",
      );
  }
  const edges = joined(picture);
  for (const { from, to } of edges)
    if (from === undefined) lines.push(`${quoted(anyDot(to))} [shape=plaintext style="" label="in every state" fontsize=11 fontcolor="#445566"];`);
  lines.push(...edges.map((edge) => edgeDot(edge, own, picture.initial)));
  if (picture.everywhere.length > 0)
    lines.push(
      `"·everywhere" [shape=plaintext style="" fontsize=10 fontcolor="#66727d" label=${quoted(`every state takes ${picture.everywhere.map(short).join(", ")}`)}];`,
    );
  return `${lines.join("\n")}\n}\n`;
}

export async function toSvg(machine: AnyStateMachine, created_by: string): Promise<string> {
  const graphviz = await instance();
  const svg = graphviz.renderString(toDot(machine, created_by), { format: "svg", engine: "dot" });
  // Arial is as wide as Helvetica; any other sans-serif would run over the edges.
  return svg.replaceAll("Helvetica,sans-Serif", "Helvetica,Arial,sans-serif");
}

/** File name → content, for every kind of actor. */
export async function drawings(): Promise<Readonly<Record<string, string>>> {
  const files: Record<string, string> = {};
  for (const { machine, kind, creates } of Object.values(definitions)) {
    files[`${kind}.mmd`] = toMermaid(machine, creates);
    files[`${kind}.svg`] = await toSvg(machine, creates);
  }
  return files;
}

/** Writes every drawing into `dir`; answers the paths. */
export async function drawAll(dir: string): Promise<string[]> {
  await mkdir(dir, { recursive: true });
  const files = Object.entries(await drawings());
  await Promise.all(files.map(([name, content]) => writeFile(join(dir, name), content)));
  return files.map(([name]) => join(dir, name));
}

// `npm run draw`, after any change to a machine.
if (import.meta.main) await drawAll(fileURLToPath(new URL("../docs/machines", import.meta.url)));
