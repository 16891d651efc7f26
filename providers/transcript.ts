// transcript: the messages of a request in the shape that every provider insists on. A session's history may have holes (a turn was cancelled
// between a call and its result); a provider refuses such a history, and would refuse it in every later turn too: the session would be dead.
//
//   T1. Every tool call of an assistant's message is followed at once by exactly one result, in the order of the calls.
//   T2. There is no result without its call.
//   T3. A history that already is so comes back with the same messages.
import type { ChatMessage } from "./provider.ts";

/** What the model reads where a call has no result. */
const NO_RESULT = "There is no result: the call was not run, or was stopped.";

/** Puts results behind their calls, fills in missing ones as errors and drops those nobody asked for. Pure. */
export function wellFormed(messages: readonly ChatMessage[]): ChatMessage[] {
  const formed: ChatMessage[] = [];
  for (const [at, message] of messages.entries()) {
    if (message.role === "tool") continue; // T2: placed with its call below, or nowhere.
    formed.push(message);
    if (message.role !== "assistant") continue;
    const results = resultsAfter(messages, at);
    for (const call of message.tool_calls) {
      formed.push(results.get(call.id) ?? { role: "tool", call_id: call.id, name: call.name, text: NO_RESULT, is_error: true });
    }
  }
  return formed;
}

/** Results between this message and the assistant's next one: ids are only unique within an answer. The first of a call counts. */
function resultsAfter(messages: readonly ChatMessage[], at: number): Map<string, ChatMessage> {
  const results = new Map<string, ChatMessage>();
  for (let next = at + 1; next < messages.length; next++) {
    const message = messages[next];
    if (message === undefined || message.role === "assistant") break;
    if (message.role === "tool" && !results.has(message.call_id)) results.set(message.call_id, message);
  }
  return results;
}
