"""A consumer that knows nothing of Streamgate but its contract: binds a queue of its own to the exchange, prints `ready`, then
one message as JSON, with the verdict of Stream's own SDK on its signature."""

import json
import sys

import pika
from stream_chat import StreamChat

url, exchange, secret = sys.argv[1:]
connection = pika.BlockingConnection(pika.URLParameters(url))
channel = connection.channel()
queue = channel.queue_declare("", exclusive=True).method.queue
channel.queue_bind(queue, exchange, routing_key="chat.push.message.*")
print("ready", flush=True)
for method, properties, body in channel.consume(queue, inactivity_timeout=60):
    if method is None:
        sys.exit("no message within 60 s")
    headers = properties.headers
    client = StreamChat(headers["x-api-key"], secret)
    print(json.dumps({
        "routing_key": method.routing_key,
        "message_id": properties.message_id,
        "type": properties.type,
        "app_id": properties.app_id,
        "timestamp": properties.timestamp,
        "content_type": properties.content_type,
        "delivery_mode": properties.delivery_mode,
        "headers": headers,
        "body": body.decode(),
        "verified": client.verify_webhook(body, headers["x-signature"]),
    }), flush=True)
    channel.basic_ack(method.delivery_tag)
    break
connection.close()
