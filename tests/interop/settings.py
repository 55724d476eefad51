"""Reads an app's settings and updates them with Stream's own library for Python: settings.py URL KEY SECRET UPDATE"""

import json
import sys

import stream_chat

url, key, secret, update = sys.argv[1:]
client = stream_chat.StreamChat(key, secret, base_url=url)
client.get_app_settings()
client.update_app_settings(**json.loads(update))
