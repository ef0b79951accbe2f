// The lessons: what is broken, and how.

import { balanceOf } from "./account.js";
import { hurry, now, onBooks } from "./books.js";
import { byId, el, setText, sleep } from "./common.js";
import { Lesson, press, switchOff } from "./lesson.js";

const GROUP = "Home"; // three of the samples, one of them broken
const KILLED_AFTER_MS = 1000;

/** A fault of the calls between app and credits service, for one call or until it is switched off. */
function fault(kind, words) {
  const run = calls => async lesson => {
    await press("/desk/fault", { kind, calls });
    lesson.say(calls === "next" ? "Switched on for one call. Sending …" : "Switched on. Sending …");
    const got = await lesson.send({ group: GROUP });
    lesson.say(words.after(got, calls));
  };
  return [
    { name: "next", label: "For one call", run: run("next") },
    { name: "every", label: "Keep it on", run: run("every") },
  ];
}

const paidOnce = "The client notices nothing but the time: it was tried again under the same key, and paid once.";
const STAYS = "Nothing ran. What the service took will be voided; switch it off, and see it come back.";

function afterUncertain(got, calls) {
  if (got.ok) return paidOnce;
  return calls === "every" ? STAYS : "Nothing ran. Whatever the service took is voided.";
}

const COLUMNS = [
  {
    heading: "No answer",
    lessons: [
      {
        id: "down",
        kind: "down",
        title: "The credits service is down",
        tells: "Every connection to it is refused. Without a deduction nothing runs: the answer is a 503 that says when to try again. Nothing was sent, so nothing has to be undone.",
        actions: fault("down", {
          after: got => (got.ok ? "An attempt came through after all: it was paid once." : "A 503. Nothing ran, and nothing was taken."),
        }),
      },
      {
        id: "slow",
        kind: "slow",
        title: "The credits service is slow",
        tells: "Each call is held up for 3 s; an attempt waits 2 s. The next one goes out under the same key, so that a copy that arrives late changes nothing. All of them late: a 503 after 5 s, and a void.",
        actions: fault("slow", { after: afterUncertain }),
      },
      {
        id: "kill-credits",
        title: "The credits service is killed",
        tells: "kill -9, and a request at the same moment. Either a later attempt finds the service up again, or the answer is a 503 and nothing ran. Its ledger is on disk: no entry is lost.",
        actions: [{
          name: "run",
          label: "Kill the service, and send",
          run: async lesson => {
            lesson.say("Killed, and sending …");
            await press("/desk/kill", { process: "credits", after_ms: 0 });
            const got = await lesson.send({ group: GROUP });
            lesson.say(got.ok ? "It got through: the service was back in time, or had answered already." : "Nothing ran. The service starts again by itself.");
          },
        }],
      },
    ],
  },
  {
    heading: "A lost or wrong answer",
    lessons: [
      {
        id: "lost",
        kind: "lost reply",
        title: "Its replies are lost",
        tells: "The deduction goes through, but its answer never arrives. Tried again under the same key, the service tells the same answer again. If every reply is lost: a 503, and a void gives back what was taken.",
        actions: fault("lost reply", { after: afterUncertain }),
      },
      {
        id: "500",
        kind: "500 after commit",
        title: "It takes the credits, and answers 500",
        tells: "The worst kind: the credits have left the account, and the answer says that something broke. A 500 is no answer. It is tried again under the same key, or voided.",
        actions: fault("500 after commit", { after: afterUncertain }),
      },
      {
        id: "twice",
        kind: "twice",
        title: "Everything is delivered twice",
        tells: "The network hands each call to the service two times. Both copies carry the same key, so that the second moves nothing.",
        actions: fault("twice", { after: got => (got.ok ? "Delivered twice, paid once." : "See the answer.") }),
      },
    ],
  },
  {
    heading: "The app and its clients",
    lessons: [
      {
        id: "kill-app",
        title: "The app is killed at work",
        tells: "Ten pictures are sent; a second later, kill -9. The client gets no answer. Its charge stands in the journal: the app that starts next finds it, and all ten credits come back.",
        actions: [{
          name: "run",
          label: "Send, then kill the app",
          run: async lesson => {
            lesson.say("Sending; the app has a second to live …");
            await press("/desk/kill", { process: "app", after_ms: KILLED_AFTER_MS });
            const got = await lesson.send();
            if (!got.down) {
              lesson.say("This time the answer was out before the app died. What was due back is on record, and comes back all the same.");
              await sleep(KILLED_AFTER_MS);
            } else {
              lesson.say("Killed. It starts again by itself, and settles what the dead process left.");
            }
          },
        }],
      },
      {
        id: "empty",
        title: "An almost empty account",
        tells: "The user poor was given 3 credits, and ten pictures cost 10. The answer is a 402 before anything runs, and what is there stays there.",
        actions: [{
          name: "run",
          label: "Send ten pictures as poor",
          run: async lesson => {
            lesson.say("Sending …");
            const got = await lesson.send({ user: "poor" });
            lesson.say(got.status === 402 ? `402: nothing ran, and nothing was taken: ${balanceOf("poor")} credits are there.` : "This time it was not a 402: see the answer.");
          },
        }],
      },
      {
        id: "same",
        title: "The same request twice",
        tells: "Two equal requests at the same time. These are two requests, so they are two charges, each with a transaction of its own: a client's own Idempotency-Key is not supported yet. What is never doubled is the charge of one request.",
        actions: [{
          name: "run",
          label: "Send it twice",
          run: async lesson => {
            lesson.say("Sending both …");
            const got = await Promise.all([lesson.send({ group: GROUP }), lesson.send({ group: GROUP })]);
            const charged = new Set(got.map(one => one.headers.get("Credits-Transaction-Id")).filter(Boolean)).size;
            lesson.say(charged === 2 ? "Two requests, two charges, each with a transaction of its own." : `Two requests, of which ${charged} were charged: see the answers.`);
          },
        }],
      },
    ],
  },
];

const FAULTS = {
  down: "The credits service is down: connections are refused",
  slow: "The credits service is slow: each call takes 3 s longer",
  "lost reply": "The credits service's replies are lost",
  "500 after commit": "The credits service does what it is asked, and answers 500",
  twice: "Every call to the credits service is delivered twice",
};

function drawFault() {
  const place = byId("fault");
  const fault = now.state?.fault;
  const on = !now.missing && fault && fault.kind !== "none";
  place.hidden = !on;
  if (!on) return;
  const calls = fault.calls === "next" ? "for the next call" : "until you switch it off";
  setText(place.firstElementChild, `${FAULTS[fault.kind] ?? fault.kind}, ${calls}. It has struck ${fault.struck === 1 ? "once" : `${fault.struck} times`}.`);
}

export function start() {
  byId("lesson-list").append(...COLUMNS.map(({ heading, lessons }) => el("section", { class: "lesson-column" },
    el("h3", { class: "label" }, heading), el("ul", {}, lessons.map(told => new Lesson(told).element)))));
  byId("fault").append(el("span", {}), " ", el("button", {
    type: "button", class: "button danger little", data: { testid: "fault-off" }, on: { click: () => switchOff().then(hurry) },
  }, "Switch it off"));
  onBooks(drawFault);
}
