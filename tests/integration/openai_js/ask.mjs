// OpenAI's JavaScript SDK, driven over JSON lines: one question a line on stdin, what became of it a line on stdout.
//
// {"baseURL", "apiKey", "maxRetries", "call", "params", "stream"} ->
// {"result"} or {"error": {"kind", "status", "code", "param", "type", "requestID"}}, and {"events"} of a stream.

import { File } from 'node:buffer';
import { createInterface } from 'node:readline';

globalThis.File ??= File; // Node 18 has it, but not as a global
const { default: OpenAI, toFile } = await import('openai');

async function withAudio(params) {
  return { ...params, file: await toFile(Buffer.from('RIFF'), 'speech.wav') };
}

const calls = {
  chat: (client, params) => client.chat.completions.create(params),
  completion: (client, params) => client.completions.create(params),
  embedding: (client, params) => client.embeddings.create(params),
  response: (client, params) => client.responses.create(params),
  transcription: async (client, params) => client.audio.transcriptions.create(await withAudio(params)),
  translation: async (client, params) => client.audio.translations.create(await withAudio(params)),
  models: (client) => client.models.list(),
  model: (client, params) => client.models.retrieve(params.model),
};

function told(error) {
  if (!(error instanceof OpenAI.OpenAIError)) throw error;
  return {
    kind: error.constructor.name,
    status: error.status ?? null,
    code: error.code ?? null,
    param: error.param ?? null,
    type: error.type ?? null,
    requestID: error.requestID ?? null,
  };
}

async function ask({ baseURL, apiKey, maxRetries, call, params, stream }) {
  const client = new OpenAI({ baseURL, apiKey, maxRetries, timeout: 20_000 });
  const events = [];
  try {
    const answer = await calls[call](client, stream ? { ...params, stream: true } : params);
    if (!stream) return { result: answer };
    for await (const event of answer) events.push(event);
    return { events };
  } catch (error) {
    return { error: told(error), events };
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  process.stdout.write(JSON.stringify(await ask(JSON.parse(line))) + '\n');
}
