// Reads an app's settings and updates them with one of Stream's own libraries for Node: settings.mjs PACKAGE.JSON LIBRARY URL KEY SECRET UPDATE
import { createRequire } from 'node:module';

const [from, library, url, key, secret, update] = process.argv.slice(2);
const require = createRequire(from);
const settings = JSON.parse(update);

if (library === 'stream-chat') {
  const { StreamChat } = require(library);
  const client = new StreamChat(key, secret, { baseURL: url });
  await client.getAppSettings();
  await client.getHookEvents(['chat']);
  await client.updateAppSettings(settings);
} else {
  const { StreamClient } = require(library);
  const client = new StreamClient(key, secret, { basePath: url });
  await client.getApp();
  await client.updateApp(settings);
}
