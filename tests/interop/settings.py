"""Reads an app's settings and updates them with one of Stream's own libraries for Python: settings.py LIBRARY URL KEY SECRET UPDATE"""

import json
import sys

library, url, key, secret, update = sys.argv[1:]
settings = json.loads(update)
if library == "stream-chat":
    import stream_chat

    client = stream_chat.StreamChat(key, secret, base_url=url)
    client.get_app_settings()
    client.update_app_settings(**settings)
else:
    from getstream import Stream
    from getstream.models import EventHook

    client = Stream(api_key=key, api_secret=secret, base_url=url)
    client.get_app()
    hooks = [EventHook(**hook) for hook in settings.pop("event_hooks")]
    client.update_app(event_hooks=hooks, **settings)
