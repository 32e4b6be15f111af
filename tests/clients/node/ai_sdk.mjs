// The Vercel AI SDK, by its provider for compatible servers and by OpenAI's own.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { ADAPTER, MODEL, QUESTION, apiKey, baseURL, feature } from "./feature.mjs";

const provider = createOpenAICompatible({ name: "polypeft", baseURL, apiKey, supportsStructuredOutputs: true });
const schema = z.object({ city: z.string().max(20), big: z.boolean() });
const ask = (model) => ({ model: provider(model), prompt: QUESTION, maxOutputTokens: 60, maxRetries: 0 });

await feature("chat", async () => (await generateText(ask(MODEL))).text);
await feature("adapter", async () => (await generateText(ask(ADAPTER))).usage.outputTokens);
await feature("stream", async () => {
  let text = "";
  for await (const piece of streamText(ask(MODEL)).textStream) text += piece;
  return text;
});
await feature("structured output", async () => {
  for await (const _ of streamObject({ ...ask(MODEL), schema }).partialObjectStream);
  return (await generateObject({ ...ask(MODEL), schema })).object;
});
await feature("tools", async () => {
  const weather = tool({ inputSchema: z.object({ city: z.string() }), execute: ({ city }) => `sunny in ${city}` });
  const answer = await generateText({ ...ask(MODEL), tools: { weather }, toolChoice: "required" });
  return answer.toolCalls.length;
});
await feature("responses", async () => {
  const openai = createOpenAI({ baseURL, apiKey });
  return (await generateText({ ...ask(MODEL), model: openai(MODEL) })).text;
});
await feature("completions", async () => {
  return (await generateText({ ...ask(MODEL), model: provider.completionModel(MODEL) })).text;
});
