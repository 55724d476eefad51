"""A webhook endpoint as Stream's docs describe it, on Stream's own SDK for Python. Prints its port, then a JSON line for
each request: whether the SDK verified the body, and the type that it parsed."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from stream_chat import StreamChat


def judge(client, body, signature):
    try:
        event = client.verify_and_parse_webhook(body, signature)
        return {"verified": True, "parsed": event.get("type")}
    except Exception as error:
        # The SDK's one error type covers both steps: the signature alone is judged by its older call.
        return {"verified": client.verify_webhook(body, signature), "parsed": None, "error": str(error)}


class Endpoint(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        client = StreamChat(self.headers["X-Api-Key"], sys.argv[1])
        judged = judge(client, body, self.headers["X-Signature"])
        print(json.dumps({"id": self.headers["X-Webhook-Id"], **judged}), flush=True)
        self.send_response(200 if judged["verified"] else 422)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
print(server.server_address[1], flush=True)
server.serve_forever()
