// estimate: how many tokens a text has, roughly and rather too many than too few, for when no provider has said it: before a call (the
// reservation) and after one that was cut off. The provider's own count is always better.
//
// Not a tokenizer on purpose: exact ones are quadratic on hostile text or need megabytes of tables, and every provider has another.
//
// The formula, per text, in one pass over its UTF-16 units:
//   a run of ASCII letters          one token per 4 letters begun     ("world" 2; English prose comes to about 1.4 times the true count)
//   a run of ASCII digits           one token per 2 digits begun
//   other visible ASCII             one token each
//   white space                     nothing for a single blank between words, else one token per 4 begun
//   U+0080 – U+07FF                 one token per 2 units begun       (Latin with accents, Greek, Cyrillic, Hebrew, Arabic)
//   U+0800 – U+FFFF                 three tokens per 2 units begun    (Chinese, Japanese, Korean, the Indic scripts, Thai)
//   half of a surrogate pair        two tokens                        (emoji)
// It is not a bound: a text made to be hard for one tokenizer can have more.
import { canonicalJson } from "../protocol/json.ts";
import type { ModelRequest, ToolCall } from "./provider.ts";

/** Units looked at one by one; a command's text is never longer. Each unit beyond counts as one token. 1 Mi units take a few milliseconds. */
const SCANNED_UNITS_MAX = 1024 * 1024;

/** What a message costs beside its text: role, separators. */
const TOKENS_PER_MESSAGE = 6;
/** What a tool's definition costs beside its JSON. */
const TOKENS_PER_TOOL = 12;

type Run = "letters" | "digits" | "blank" | "middle" | "high" | "other";
const UNITS_PER_STEP: Readonly<Record<Run, number>> = { letters: 4, digits: 2, blank: 4, middle: 2, high: 2, other: 1 };

/** Tokens of a text. Promises: at least 1 for a text with anything visible in it, time in proportion to the length. */
export function estimateTokens(text: string): number {
  const scanned = Math.min(text.length, SCANNED_UNITS_MAX);
  let tokens = 0;
  let run: Run = "other";
  let run_units = 0;
  const closeRun = () => {
    if (run_units === 0) return;
    if (run === "blank" && run_units === 1) return;
    const steps = Math.ceil(run_units / UNITS_PER_STEP[run]);
    tokens += run === "high" ? 3 * steps : steps;
  };
  for (let at = 0; at < scanned; at++) {
    const unit = text.charCodeAt(at);
    if (unit >= 0xd800 && unit <= 0xdfff) {
      closeRun();
      run_units = 0;
      tokens += 2;
      continue;
    }
    const kind = runOf(unit);
    if (kind !== run) {
      closeRun();
      run = kind;
      run_units = 0;
    }
    run_units += 1;
  }
  closeRun();
  return tokens + (text.length - scanned);
}

function runOf(unit: number): Run {
  if (unit >= 0x800) return "high";
  if (unit >= 0x80) return "middle";
  if ((unit >= 97 && unit <= 122) || (unit >= 65 && unit <= 90)) return "letters";
  if (unit >= 48 && unit <= 57) return "digits";
  return unit <= 32 ? "blank" : "other";
}

/** Tokens that a tool call takes beside its arguments. */
export function estimateCallHeadTokens(name: string): number {
  return TOKENS_PER_MESSAGE + estimateTokens(name);
}

/** Tokens that a tool call takes in an answer, and again in every later prompt. */
function estimateCallTokens(call: ToolCall): number {
  return estimateCallHeadTokens(call.name) + estimateTokens(call.invalid_args ?? canonicalJson(call.args));
}

/** Tokens of a whole prompt: instructions, messages and tools. What an opaque continuation costs is counted by its JSON. */
export function estimateInputTokens(request: Pick<ModelRequest, "instructions" | "messages" | "tools">): number {
  let tokens = TOKENS_PER_MESSAGE + estimateTokens(request.instructions);
  for (const message of request.messages) {
    tokens += TOKENS_PER_MESSAGE + estimateTokens(message.text);
    if (message.role !== "assistant") continue;
    for (const call of message.tool_calls) tokens += estimateCallTokens(call);
    if (message.continuation !== undefined) tokens += estimateTokens(canonicalJson(message.continuation));
  }
  for (const tool of request.tools) {
    tokens += TOKENS_PER_TOOL + estimateTokens(tool.name) + estimateTokens(tool.description) + estimateTokens(canonicalJson(tool.parameters));
  }
  return tokens;
}
