// The `openai` package for Node: what its documentation shows first.
import OpenAI, { toFile } from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { ADAPTER, MODEL, QUESTION, apiKey, baseURL, feature } from "./feature.mjs";

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: QUESTION }];
const City = z.object({ city: z.string().max(20), big: z.boolean() });

await feature("chat", async () => {
  const answer = await client.chat.completions.create({ model: MODEL, messages, max_tokens: 8 });
  return answer.choices[0].message.content;
});
await feature("adapter", async () => {
  const answer = await client.chat.completions.create({ model: ADAPTER, messages, max_tokens: 8 });
  return answer.model === ADAPTER && answer.usage.completion_tokens;
});
await feature("stream", async () => {
  const stream = client.chat.completions.stream({ model: MODEL, messages, max_tokens: 8 });
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta.content ?? "";
  return text;
});
await feature("structured output", async () => {
  const response_format = zodResponseFormat(City, "city");
  const answer = await client.chat.completions.parse({ model: MODEL, messages, response_format, max_tokens: 60 });
  return answer.choices[0].message.parsed;
});
await feature("tools", async () => {
  const weather = {
    type: "function",
    function: {
      name: "weather",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
      parse: JSON.parse,
      function: ({ city }) => `sunny in ${city}`,
    },
  };
  const runner = client.chat.completions.runTools({ model: MODEL, messages, tools: [weather], max_tokens: 60 });
  await runner.done();
  return true;
});
await feature("responses", async () => {
  return (await client.responses.create({ model: MODEL, input: QUESTION, max_output_tokens: 16 })).output_text;
});
await feature("completions", async () => {
  return (await client.completions.create({ model: MODEL, prompt: "Once", max_tokens: 8 })).choices[0].text;
});
await feature("models", async () => {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  return ids.includes(MODEL) && ids.includes(ADAPTER);
});
await feature("files", async () => {
  const line = '{"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}\n';
  const upload = await toFile(Buffer.from(line.repeat(10)), "a.jsonl");
  const expires_after = { anchor: "created_at", seconds: 3600 };
  const file = await client.files.create({ file: upload, purpose: "fine-tune", expires_after });
  return file.expires_at === file.created_at + 3600 && (await client.files.delete(file.id)).deleted;
});
await feature("batches", async () => (await client.batches.list()).data);
await feature("errors", async () => {
  try {
    await client.chat.completions.create({ model: MODEL, messages, temperature: 3 });
  } catch (error) {
    return error instanceof OpenAI.BadRequestError && error.param === "temperature";
  }
});
