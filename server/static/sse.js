// Server-sent events out of the body of a fetch: EventSource cannot POST.

/**
 * The events of a stream as { event, data }, as the HTML standard reads them: lines end with LF, CR or
 * CRLF, an empty one ends an event, `data` lines are joined, other fields and comments are passed over.
 * What is not ended by an empty line is dropped.
 */
export async function* eventsOf(body) {
  let event = "message";
  let data = [];
  for await (const line of linesOf(body)) {
    if (line === "") {
      if (data.length) yield { event, data: data.join("\n") };
      event = "message";
      data = [];
      continue;
    }
    const [, field, value] = /^([^:]*):? ?([^]*)$/.exec(line);
    if (field === "event") event = value;
    if (field === "data") data.push(value);
  }
}

async function* linesOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) {
        if (rest.endsWith("\r")) yield rest.slice(0, -1);
        return;
      }
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/); // a CR at the very end may be half a CRLF
      rest = lines.pop();
      yield* lines;
    }
  } finally {
    await reader.cancel().catch(() => {}); // whoever stops reading leaves the server nothing to compute
  }
}
