// Dapr's SDK for JavaScript (npm @dapr/dapr), unmodified: subscribes in each of its ways, and publishes and invokes when it
// is asked to. PROTOCOL is http or grpc. What happens is a line of JSON in TEST_LOG.

const fs = require("fs");
const { CommunicationProtocolEnum, DaprPubSubStatusEnum, DaprServer, HttpMethod } = require("@dapr/dapr");

const grpc = process.env.PROTOCOL === "grpc";
const communicationProtocol = grpc ? CommunicationProtocolEnum.GRPC : CommunicationProtocolEnum.HTTP;
const note = (line) => fs.appendFileSync(process.env.TEST_LOG, JSON.stringify(line) + "\n");
const handler = (topic) => async (data) => note({ topic, data });

// What went wrong, whichever way the SDK says it.
async function failure(call) {
  try {
    const answer = await call();
    return answer && answer.error ? String(answer.error) : "nothing failed";
  } catch (error) {
    return String(error.error ?? error.message ?? error);
  }
}

async function act(client) {
  const { pubsub, invoker, metadata, health, state } = client;
  const publish = (topic, data, options) => pubsub.publish("default", topic, data, options);
  await publish("plain", { n: 1 });
  await publish("plain", "text");
  await publish("plain", { specversion: "1.0", id: "own", source: "/js", type: "own", data: { n: 2 } });
  await publish("raw", { n: 3 }, { metadata: { rawPayload: "true" } });
  await publish("rawbulk", { n: 9 });
  await publish("routed", { n: 4 });
  await publish("routed", { n: 5 }, { metadata: { "cloudevent.type": "important" } });
  await publish("retried", { n: 6 });
  await publish("dropped", { n: 7 });
  const bulk = await pubsub.publishBulk("default", "bulk", ["b1", { n: 8 }]);
  await metadata.set("team", "blue");
  const about = await metadata.get();
  return {
    bulkFailed: bulk.failedMessages.length,
    healthy: await health.isHealthy(),
    id: about.id,
    team: about.extended.team,
    invoked: await invoker.invoke(process.env.SERVICE, "hello", HttpMethod.POST, { name: "Duet" }),
    noBus: await failure(() => pubsub.publish("nowhere", "plain", "x")),
    state: await failure(() => state.save("store", [{ key: "k", value: "v" }])),
  };
}

async function main() {
  const daprPort = grpc ? process.env.DAPR_GRPC_PORT : process.env.DAPR_HTTP_PORT;
  const server = new DaprServer({
    serverHost: "127.0.0.1",
    communicationProtocol,
    clientOptions: { daprHost: "127.0.0.1", daprPort, communicationProtocol },
  });
  const { pubsub, invoker } = server;
  await pubsub.subscribe("default", "plain", handler("plain"));
  await pubsub.subscribe("default", "raw", handler("raw"), undefined, { rawPayload: true });
  await pubsub.subscribeBulk("default", "bulk", handler("bulk"), { maxMessagesCount: 10, maxAwaitDurationMs: 100 });
  const rawPayload = { metadata: { rawPayload: true } };
  await pubsub.subscribeBulk("default", "rawbulk", handler("rawbulk"), { maxMessagesCount: 10, ...rawPayload });
  await pubsub.subscribeWithOptions("default", "routed", {
    route: { default: "/other", rules: [{ match: 'event.type == "important"', path: "/important" }] },
  });
  pubsub.subscribeToRoute("default", "routed", "/other", handler("other"));
  pubsub.subscribeToRoute("default", "routed", "/important", handler("important"));
  let tries = 0;
  await pubsub.subscribe("default", "retried", async (data) => {
    tries += 1;
    note({ topic: "retried", data, tries });
    return tries < 2 ? DaprPubSubStatusEnum.RETRY : DaprPubSubStatusEnum.SUCCESS;
  });
  await pubsub.subscribeWithOptions("default", "dropped", {
    callback: async () => DaprPubSubStatusEnum.DROP,
    deadLetterTopic: "lost",
  });
  await pubsub.subscribe("default", "lost", handler("lost"));
  await invoker.listen("hello", async ({ body }) => ({ hello: JSON.parse(body).name }), { method: HttpMethod.POST });
  await invoker.listen("act", async () => act(server.client), { method: HttpMethod.POST });
  await server.start();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
