// The demo's page: pictures in, the bill, the lessons, the books, the statement.

import * as account from "./account.js";
import * as books from "./books.js";
import { samples } from "./client.js";
import { byId, setText } from "./common.js";
import * as lessons from "./lessons.js";
import * as run from "./run.js";
import * as statement from "./statement.js";
import * as tray from "./tray.js";

account.start();
run.start();
lessons.start();
statement.start();
tray.onTray(account.drawQuote);
books.onBooks(books.drawBooks);
books.watch();

byId("samples").addEventListener("click", async () => {
  const body = await samples();
  if (body) tray.load(body);
  else setText(byId("says"), "The app gives no samples: it is down. Try again in a moment.");
});

const json = "-H 'Content-Type: application/json' -d @.demo/request.json";
byId("curl").textContent = [
  `curl -s -i -H 'Authorization: Bearer demo' ${json} ${location.host}/create-products`,
  `curl -s -i -H 'Authorization: Bearer poor' ${json} ${location.host}/create-products`,
  `curl -s -H 'Authorization: Bearer demo' ${location.host}/me`,
].join("\n");
