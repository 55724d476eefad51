// A service on Node with all its defaults, those of its connections too: answers every hook, and prints its port.
import { createServer } from 'node:http';

const server = createServer((request, response) => {
  request.resume();
  request.on('end', () => {
    response.setHeader('content-type', 'application/json');
    response.end(JSON.stringify({ message: { text: 'by the service' } }));
  });
});
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
