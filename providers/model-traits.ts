// model-traits: what no price table says of a model: what it can do, how much it may answer, whether it is on its way out, and how good it is.
//
// Written by hand from the providers' own pages. What is not known is left out and stays unknown (null); nothing is guessed. `quality` is an ordinal of
// ours, 0 to 100, from the place that a provider gives a model in its line and from its generation: good for an order, not for arithmetic. A model
// without one is never recommended. First match wins.

export interface Traits {
  readonly quality?: number;
  readonly output_tokens_max?: number;
  readonly tools?: boolean;
  readonly vision?: boolean;
  readonly reasoning?: boolean;
  readonly json?: boolean;
  /** From this day on it is not to be chosen for anything new. */
  readonly deprecated_at?: string;
  /** It does something else than answer a conversation in text: embeddings, speech, pictures, an endpoint of its own. */
  readonly other?: true;
}

const ALL = { tools: true, vision: true, reasoning: true, json: true } as const;
const PLAIN = { tools: true, vision: true, reasoning: false, json: true } as const;
const OLD = { tools: false, vision: false, reasoning: false, json: false } as const;

type Table = readonly (readonly [RegExp, Traits])[];

const ANTHROPIC: Table = [
  [/^claude-(v1|1|2|instant)/, { ...OLD, deprecated_at: "2025-01-21" }],
  [/^claude-3-sonnet/, { ...PLAIN, deprecated_at: "2025-01-21", output_tokens_max: 4_096 }],
  [/^claude-3-opus/, { ...PLAIN, deprecated_at: "2025-06-30", output_tokens_max: 4_096 }],
  [/^claude-3-haiku/, { ...PLAIN, deprecated_at: "2026-01-05", output_tokens_max: 4_096 }],
  [/^claude-3-5-sonnet/, { ...PLAIN, deprecated_at: "2025-08-13", output_tokens_max: 8_192 }],
  [/^claude-3-5-haiku/, { ...PLAIN, deprecated_at: "2026-01-05", output_tokens_max: 8_192 }],
  [/^claude-3-7-sonnet/, { ...ALL, deprecated_at: "2025-10-28", output_tokens_max: 64_000 }],
  [/^claude-fable-5-1/, { ...ALL, quality: 98 }],
  [/^claude-fable-5/, { ...ALL, quality: 96 }],
  [/^claude-opus-5-5/, { ...ALL, quality: 95 }],
  [/^claude-opus-5/, { ...ALL, quality: 93 }],
  [/^claude-opus-4-[78]/, { ...ALL, quality: 91 }],
  [/^claude-opus-4-[56]/, { ...ALL, quality: 88 }],
  [/^claude-opus-4-[01]/, { ...ALL, quality: 80, output_tokens_max: 32_000 }],
  [/^claude-sonnet-5/, { ...ALL, quality: 90 }],
  [/^claude-sonnet-4-6/, { ...ALL, quality: 84 }],
  [/^claude-sonnet-4-5/, { ...ALL, quality: 82, output_tokens_max: 64_000 }],
  [/^claude-sonnet-4-0/, { ...ALL, quality: 76, output_tokens_max: 64_000 }],
  [/^claude-haiku-4-5/, { ...ALL, quality: 72, output_tokens_max: 64_000 }],
];

const OPENAI: Table = [
  [/embedding|whisper|tts|transcribe|image|audio|realtime|moderation|search-preview|computer-use|deep-research|safeguard|^ft:|\.ft-/, { other: true }],
  [/^(ada|babbage|curie|davinci|text-davinci)/, { ...OLD, deprecated_at: "2023-07-06", other: true }],
  [/^gpt-3\.5-turbo-instruct/, { ...OLD, other: true }],
  [/^gpt-3\.5-(0301|turbo-0613|turbo-16k)/, { deprecated_at: "2024-02-13" }],
  [/^gpt-3\.5/, { ...PLAIN, vision: false, quality: 20, output_tokens_max: 4_096 }],
  [/^gpt-4-(32k|vision-preview)/, { deprecated_at: "2024-06-06" }],
  [/^gpt-4\.5-preview/, { deprecated_at: "2025-04-14" }],
  [/^gpt-4-turbo/, { ...PLAIN, quality: 42, output_tokens_max: 4_096 }],
  [/^gpt-4\.1-nano/, { ...PLAIN, quality: 38, output_tokens_max: 32_768 }],
  [/^gpt-4\.1-mini/, { ...PLAIN, quality: 50, output_tokens_max: 32_768 }],
  [/^gpt-4\.1$/, { ...PLAIN, quality: 58, output_tokens_max: 32_768 }],
  [/^gpt-4o-mini/, { ...PLAIN, quality: 40, output_tokens_max: 16_384 }],
  [/^gpt-4o(-2024-05-13)?$/, { ...PLAIN, quality: 52, output_tokens_max: 16_384 }],
  [/^gpt-4$/, { ...PLAIN, vision: false, quality: 40, output_tokens_max: 8_192 }],
  [/^(chatgpt-4o|gpt-chat|gpt-4o:)/, { tools: false }],
  [/^o1-(mini|preview)/, { reasoning: true, deprecated_at: "2025-04-28" }],
  [/^o1-pro/, { ...ALL, quality: 70, output_tokens_max: 100_000 }],
  [/^o1/, { ...ALL, quality: 66, output_tokens_max: 100_000 }],
  [/^o3-pro/, { ...ALL, quality: 77, output_tokens_max: 100_000 }],
  [/^o3-mini/, { ...ALL, vision: false, quality: 62, output_tokens_max: 100_000 }],
  [/^o3/, { ...ALL, quality: 74, output_tokens_max: 100_000 }],
  [/^o4-mini/, { ...ALL, quality: 68, output_tokens_max: 100_000 }],
  [/^codex-mini/, { ...ALL, quality: 66, output_tokens_max: 100_000 }],
  // Open weights: OpenAI itself does not serve them. A server of one's own does, under its own name.
  [/^gpt-oss-/, { other: true, tools: true, vision: false, reasoning: true, json: true, output_tokens_max: 131_072 }],
  [/^gpt-5-pro/, { ...ALL, quality: 84, output_tokens_max: 272_000 }],
  [/^gpt-5-mini/, { ...ALL, quality: 68, output_tokens_max: 128_000 }],
  [/^gpt-5-nano/, { ...ALL, quality: 54, output_tokens_max: 128_000 }],
  [/^gpt-5$/, { ...ALL, quality: 80, output_tokens_max: 128_000 }],
  [/^gpt-5\.1-codex-mini/, { ...ALL, quality: 69 }],
  [/^gpt-5\.1/, { ...ALL, quality: 82, output_tokens_max: 128_000 }],
  [/^gpt-5\.2-pro/, { ...ALL, quality: 88 }],
  [/^gpt-5\.2/, { ...ALL, quality: 85 }],
  [/^gpt-5\.3-codex/, { ...ALL, quality: 87 }],
  [/^gpt-5\.3$/, { tools: true, vision: true, json: true, quality: 76 }],
  [/^gpt-5\.4-pro/, { ...ALL, quality: 91 }],
  [/^gpt-5\.4-mini/, { ...ALL, quality: 75 }],
  [/^gpt-5\.4-nano/, { ...ALL, quality: 62 }],
  [/^gpt-5\.4/, { ...ALL, quality: 88 }],
  [/^gpt-5\.5-pro/, { ...ALL, quality: 94 }],
  [/^gpt-5\.5/, { ...ALL, quality: 90 }],
  [/^gpt-5\.6-sol/, { ...ALL, quality: 92 }],
  [/^gpt-5\.6-terra/, { ...ALL, quality: 86 }],
  [/^gpt-5\.6-luna/, { ...ALL, quality: 76 }],
  [/^gpt-6-astra/, { ...ALL, quality: 97 }],
  [/^gpt-6-sol/, { ...ALL, quality: 94 }],
  [/^gpt-6-luna/, { ...ALL, quality: 80 }],
];

const GOOGLE: Table = [
  [/embedding|tts|image|live|omni|vision/, { other: true }],
  [/^gemini-(pro|1\.0)$/, { deprecated_at: "2024-02-15" }],
  [/^gemini-(1\.5|pro-1\.5|flash-1\.5)/, { ...PLAIN, deprecated_at: "2025-04-29", output_tokens_max: 8_192 }],
  [/^gemini-2\.0-flash-lite/, { ...PLAIN, deprecated_at: "2026-02-03", output_tokens_max: 8_192 }],
  [/^gemini-2\.0-flash/, { ...PLAIN, deprecated_at: "2026-02-03", output_tokens_max: 8_192 }],
  [/^gemini-2\.5-pro/, { ...ALL, quality: 78, output_tokens_max: 65_536 }],
  [/^gemini-2\.5-flash-lite/, { ...ALL, quality: 50, output_tokens_max: 65_536 }],
  [/^gemini-2\.5-flash$/, { ...ALL, quality: 64, output_tokens_max: 65_536 }],
  [/^gemini-3\.1-pro/, { ...ALL, quality: 88 }],
  [/^gemini-3-pro/, { ...ALL, quality: 86, output_tokens_max: 65_536 }],
  [/^gemini-3-flash/, { ...ALL, quality: 76, output_tokens_max: 65_536 }],
  [/^gemini-3\.1-flash-lite/, { ...ALL, quality: 66 }],
  [/^gemini-3\.5-flash-lite/, { ...ALL, quality: 70 }],
  [/^gemini-3\.5-flash/, { ...ALL, quality: 82 }],
  [/^gemini-3\.6-flash/, { ...ALL, quality: 84 }],
  [/^gemini-3\.7-flash/, { ...ALL, quality: 86 }],
  [/^gemini-3\.8-flash/, { ...ALL, quality: 88 }],
];

const TABLES: Readonly<Record<string, Table>> = { anthropic: ANTHROPIC, openai: OPENAI, google: GOOGLE };

/** What is known of a model beside its price. Empty: nothing. */
export function traitsOf(provider: string, name: string): Traits {
  return (Object.hasOwn(TABLES, provider) ? TABLES[provider] : undefined)?.find(([pattern]) => pattern.test(name))?.[1] ?? {};
}
