// A webhook endpoint as Stream's docs describe it, on one of Stream's own SDKs for Node. Prints its port, then a JSON line for each
// request: whether the SDK verified the body, and the type that it parsed.
import { createServer } from 'node:http';
import { createRequire } from 'node:module';

const require = createRequire(process.argv[2]);
const library = process.argv[4];
const Client = library === 'stream-chat' ? require(library).StreamChat : require(library).StreamClient;

function judge(client, body, signature) {
  try {
    const event = client.verifyAndParseWebhook(body, signature);
    return { verified: true, parsed: event.type ?? null };
  } catch (error) {
    // The SDK's one error type covers both steps: the signature alone is judged by its older call.
    return { verified: client.verifyWebhook(body, signature), parsed: null, error: String(error.message) };
  }
}

const server = createServer((request, response) => {
  const pieces = [];
  request.on('data', (piece) => pieces.push(piece));
  request.on('end', () => {
    const client = new Client(request.headers['x-api-key'], process.argv[3]);
    const judged = judge(client, Buffer.concat(pieces), request.headers['x-signature']);
    console.log(JSON.stringify({ id: request.headers['x-webhook-id'], ...judged }));
    response.statusCode = judged.verified ? 200 : 422;
    response.end();
  });
});
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
