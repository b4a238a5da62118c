// The `openai` package against the server whose URL is the first argument. Prints what came.
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0 });
const capital = [{ role: "user", content: "What is the capital of France?" }];
const fields = { model: "box", temperature: 0, max_tokens: 300 };
const Place = z.object({ city: z.string().max(20), kind: z.enum(["capital", "village"]) });

async function streamed() {
  let text = "";
  const stream = await client.chat.completions.create({
    ...fields,
    messages: capital,
    stream: true,
    stream_options: { include_usage: true },
  });
  let usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  return { text, usage };
}

async function runTools(extra) {
  const asked = [];
  const quiz = zodFunction({
    name: "quiz",
    description: "The next question of the quiz.",
    parameters: z.object({ is_hard: z.boolean() }),
    function: (given) => {
      asked.push(given);
      return "What is the capital of Japan?";
    },
  });
  const runner = client.chat.completions.runTools({
    ...fields,
    ...extra,
    messages: [{ role: "user", content: "Ask the quiz for a question, and answer it." }],
    tools: [quiz],
    tool_choice: { type: "function", function: { name: "quiz" } },
  });
  // The package ends its loop at a named call: the second turn is ours.
  await runner.done();
  const answer = await client.chat.completions.create({
    ...fields,
    messages: runner.messages,
    tools: [{ type: "function", function: quiz.function }],
  });
  return { asked, text: answer.choices[0].message.content };
}

async function parsed() {
  const response_format = zodResponseFormat(Place, "place");
  const whole = await client.chat.completions.parse({
    ...fields,
    messages: capital,
    response_format,
  });
  const stream = client.chat.completions.stream({ ...fields, messages: capital, response_format });
  const final = await stream.finalChatCompletion();
  return {
    whole: Place.parse(whole.choices[0].message.parsed),
    streamed: Place.parse(final.choices[0].message.parsed),
  };
}

async function responses() {
  const asked = { model: "box", temperature: 0, input: capital[0].content };
  const whole = await client.responses.create(asked);
  const stream = client.responses.stream(asked);
  let text = "";
  for await (const event of stream) {
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  const final = await stream.finalResponse();
  const made = await client.responses.create({ ...asked, background: true });
  let followed = "";
  for await (const event of await client.responses.retrieve(made.id, { stream: true })) {
    if (event.type === "response.output_text.delta") followed += event.delta;
  }
  const place = await client.responses.parse({
    ...asked,
    text: { format: zodTextFormat(Place, "place") },
    max_output_tokens: 300,
  });
  return {
    texts: [whole.output_text, text, final.output_text, followed],
    place: Place.parse(place.output_parsed),
  };
}

async function refused() {
  try {
    await client.chat.completions.create({ ...fields, temperature: 9, messages: capital });
  } catch (error) {
    return { name: error.constructor.name, status: error.status, param: error.param };
  }
}

const whole = await client.chat.completions.create({ ...fields, messages: capital });
const legacy = await client.completions.create({ model: "box", prompt: "Hello", max_tokens: 4 });
const found = {
  whole: whole.choices[0].message.content,
  streamed: await streamed(),
  tools: await runTools({}),
  streamedTools: await runTools({ stream: true }),
  parsed: await parsed(),
  refused: await refused(),
  responses: await responses(),
  completionTokens: legacy.usage.completion_tokens,
  models: (await client.models.list()).data.map((model) => model.id),
};
console.log(JSON.stringify(found));
