// The Vercel AI SDK against the server whose URL is the first argument. Prints what came.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

globalThis.AI_SDK_LOG_WARNINGS = false;
const baseURL = `${process.argv[2]}/v1`;
const compatible = createOpenAICompatible({
  name: "streamserve",
  baseURL,
  apiKey: "none",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const models = {
  compatible: compatible("box"),
  completion: compatible.completionModel("box"),
  openai: createOpenAI({ baseURL, apiKey: "none" }).chat("box"),
  responses: createOpenAI({ baseURL, apiKey: "none" }).responses("box"),
};
const Place = z.object({ city: z.string().max(20), kind: z.enum(["capital", "village"]) });
const ask = { prompt: "What is the capital of France?", maxOutputTokens: 300, maxRetries: 0 };

async function text(model) {
  const whole = await generateText({ ...ask, model, temperature: 0 });
  const stream = streamText({ ...ask, model, temperature: 0 });
  let streamed = "";
  for await (const piece of stream.textStream) streamed += piece;
  return {
    whole: whole.text,
    finishReason: whole.finishReason,
    usage: whole.usage,
    streamed,
    streamedFinishReason: await stream.finishReason,
    streamedUsage: await stream.usage,
  };
}

async function loop(model, call) {
  const asked = [];
  const quiz = tool({
    description: "The next question of the quiz.",
    inputSchema: z.object({ is_hard: z.boolean() }),
    strict: true,
    execute: (given) => {
      asked.push(given);
      return "What is the capital of Japan?";
    },
  });
  const result = await call({
    model,
    temperature: 0,
    maxOutputTokens: 300,
    maxRetries: 0,
    prompt: "Ask the quiz for a question, and answer it.",
    tools: { quiz },
    stopWhen: stepCountIs(3),
    prepareStep: ({ stepNumber }) => ({
      toolChoice: stepNumber === 0 ? { type: "tool", toolName: "quiz" } : "auto",
    }),
  });
  const reasons = (await result.steps).map((step) => step.finishReason);
  return { asked, text: await result.text, reasons };
}

async function streamingLoop(options) {
  const result = streamText(options);
  const kinds = [];
  for await (const part of result.fullStream) {
    if (part.type === "error") throw part.error;
    kinds.push(part.type);
  }
  if (!kinds.includes("tool-input-delta")) throw new Error("arguments did not stream");
  return result;
}

async function objects(model) {
  const { object } = await generateObject({ ...ask, model, schema: Place, temperature: 0 });
  const stream = streamObject({ ...ask, model, schema: Place, temperature: 0 });
  let pieces = 0;
  for await (const _ of stream.partialObjectStream) pieces += 1;
  const output = await generateText({
    ...ask, model, temperature: 0, output: Output.object({ schema: Place }),
  });
  const choice = await generateObject({
    ...ask, model, output: "enum", enum: ["Paris", "Rome"], temperature: 0,
  });
  return {
    object,
    streamed: await stream.object,
    pieces,
    output: output.output,
    choice: choice.object,
  };
}

const found = { completion: await text(models.completion) };
for (const name of ["compatible", "openai", "responses"]) {
  const model = models[name];
  found[name] = {
    text: await text(model),
    loop: await loop(model, generateText),
    streamingLoop: await loop(model, streamingLoop),
    objects: await objects(model),
  };
}
console.log(JSON.stringify(found));
