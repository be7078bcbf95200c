// A queueing network over bm3il's remote wire (docs/remote.md), with Node.js and nothing else: three dispatchers send jobs
// to two servers, which choose whose queue to serve. Deterministic from the seed.
//
//     node queues.js [--fault KIND@STEP [--once FOLDER]] [--listen PORT] [--most ENVIRONMENTS]
//
// KIND: nan, short, double, silence, exit, bits, chatter, fail, endless, stuck, deaf, throw, spec, version, misspelt.
// FOLDER is taken away by the first that fails; without it nobody does.
'use strict';

const DISPATCHERS = 3, SERVERS = 2, ROOM = 3, CROWD = 30, STEPS = 40, SETUP_STEP = 2;
const args = process.argv.slice(2);
const fs = require('fs');
const option = (name) => (args.includes(name) ? args[args.indexOf(name) + 1] : '');
const [fault, faultStep] = option('--fault').split('@');

function random(seed) { // mulberry32
  let a = seed >>> 0;
  return () => {
    a = (a + 0x6d2b79f5) >>> 0;
    let t = Math.imul(a ^ (a >>> 15), a | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

class Network {
  constructor(seed) {
    this.random = random(seed);
    this.step = 0;
    this.waiting = Array(DISPATCHERS).fill(1); // jobs that a dispatcher holds
    this.queues = Array.from({ length: SERVERS }, () => Array(DISPATCHERS).fill(0));
    this.last = Array(SERVERS).fill(0);
    this.lost = 0;
  }

  advance(sent, served) {
    this.lost = 0;
    sent.forEach((server, d) => {
      if (server > 0) { this.waiting[d] -= 1; this.queues[server - 1][d] += 1; }
      if (this.random() < 0.55) {
        if (this.waiting[d] < ROOM) this.waiting[d] += 1; else this.lost += 1;
      }
    });
    served.forEach((choice, s) => {
      if (!this.works(s) || choice === 0) return;
      if (choice === this.last[s] || this.random() < 0.7) this.queues[s][choice - 1] -= 1; // to turn to another takes time
      this.last[s] = choice;
    });
    this.step += 1;
  }

  works(s) { return s === 0 || this.step >= SETUP_STEP; } // the second server comes later

  load(s) { return this.queues[s].reduce((a, b) => a + b, 0); }

  seenByDispatcher(d) {
    return [this.waiting[d], ...this.queues.map((q) => q[d]), ...this.queues.map((_, s) => this.load(s))];
  }

  seenByServer(s) { return [...this.queues[s], this.load(1 - s), ...[1, 2, 3].map((c) => Number(this.last[s] === c))]; }

  get terminated() { return this.load(0) + this.load(1) > CROWD; }
}

const TYPES = [
  {
    name: 'dispatcher', count: DISPATCHERS, observation_dim: 5, action_dim: 1 + SERVERS, discrete: true, masks: true,
    parts: [{ name: 'own', width: 1 }, { name: 'queues', width: 2 }, { name: 'loads', width: 2 }],
  },
  { name: 'server', count: SERVERS, observation_dim: 7, action_dim: 1 + DISPATCHERS, masks: true, active: true },
];

function spec() {
  const told = { protocol: 1, name: 'queues', episode_length: STEPS, types: TYPES };
  if (fault === 'version') told.protocol = 2;
  if (fault === 'misspelt') { told.episode_lenght = STEPS; delete told.episode_length; }
  if (fault === 'spec') told.types = [{ ...TYPES[0], count: 0 }];
  return message('SPEC', Buffer.from(JSON.stringify(told)));
}

function message(kind, body) {
  const head = Buffer.alloc(8);
  head.write(kind, 0, 'latin1');
  head.writeUInt32LE(body.length, 4);
  return Buffer.concat([head, body]);
}

function show(networks) {
  const range = (n) => [...Array(n).keys()];
  const numbers = [], bits = [];
  for (const n of networks) for (const d of range(DISPATCHERS)) numbers.push(...n.seenByDispatcher(d));
  for (const n of networks) for (const s of range(SERVERS)) numbers.push(...n.seenByServer(s));
  for (const n of networks) for (const _ of range(DISPATCHERS)) numbers.push(-n.load(0) - n.load(1) - 5 * n.lost);
  for (const n of networks) for (const s of range(SERVERS)) numbers.push(-n.load(s));
  for (const n of networks) for (const d of range(DISPATCHERS)) {
    const free = n.waiting[d] > 0;
    bits.push(Number(n.waiting[d] < ROOM), Number(free), Number(free));
  }
  for (const n of networks) for (const s of range(SERVERS)) bits.push(1, ...n.queues[s].map((jobs) => Number(jobs > 0)));
  for (const n of networks) for (const s of range(SERVERS)) bits.push(Number(n.works(s)));
  for (const n of networks) bits.push(Number(n.terminated));
  for (const n of networks) bits.push(Number(!n.terminated && n.step >= STEPS));
  return [numbers, bits];
}

function taken(folder) {
  try { fs.rmdirSync(folder); } catch { return false; }
  return true;
}

class Session { // the copies of one connection
  constructor() { this.networks = []; }

  get step() { return this.networks[0].step; }

  shown() {
    const [numbers, bits] = show(this.networks);
    const due = this.step === Number(faultStep) ? fault : '';
    if (due === 'nan') numbers[6] = NaN;
    if (due === 'stuck') bits.fill(0, 0, 3);
    if (due === 'bits') bits[1] = 2;
    if (due === 'short') bits.pop();
    if (due === 'throw') throw new Error('the server room is under water');
    const floats = due === 'double' ? Float64Array : Float32Array;
    return message('SHOW', Buffer.concat([Buffer.from(floats.from(numbers).buffer), Buffer.from(bits)]));
  }

  answer(kind, question) {
    if (kind === 'HELO') {
      const { environments } = JSON.parse(question);
      const most = Number(option('--most') || environments);
      return environments > most ? message('FAIL', Buffer.from(`at most ${most} copies`)) : spec();
    }
    if (kind === 'RSET') {
      this.networks = [];
      for (let at = 0; at < question.length; at += 4) this.networks.push(new Network(question.readUInt32LE(at)));
      return this.shown();
    }
    const actions = [];
    for (let at = 0; at < question.length; at += 4) actions.push(question.readInt32LE(at));
    const servers = DISPATCHERS * this.networks.length;
    this.networks.forEach((n, e) => {
      if (n.terminated || n.step >= STEPS) return; // it has ended; what it shows is not looked at any more
      const first = servers + e * SERVERS;
      n.advance(actions.slice(e * DISPATCHERS, (e + 1) * DISPATCHERS), actions.slice(first, first + SERVERS));
    });
    return this.failed() || this.shown();
  }

  failed() {
    if (this.step !== Number(faultStep) || (option('--once') && !taken(option('--once')))) return null;
    if (fault === 'silence') return Buffer.alloc(0);
    if (fault === 'deaf') for (;;); // hears neither questions nor the end of its input
    if (fault === 'exit') { console.error('the queue is on fire\ngood bye'); process.exit(3); }
    if (fault === 'chatter') console.log('three jobs have left');
    if (fault === 'fail') return message('FAIL', Buffer.from('no server left'));
    if (fault === 'endless') return Buffer.from('SHOW\xff\xff\xff\xff', 'latin1');
    return null;
  }
}

function talk(input, output) {
  const session = new Session();
  let heard = Buffer.alloc(0);
  input.on('data', (chunk) => {
    heard = Buffer.concat([heard, chunk]);
    while (heard.length >= 8 && heard.length >= 8 + heard.readUInt32LE(4)) {
      const end = 8 + heard.readUInt32LE(4);
      output.write(session.answer(heard.toString('latin1', 0, 4), heard.subarray(8, end)));
      heard = heard.subarray(end);
    }
  });
}

if (option('--listen')) {
  const server = require('net').createServer((socket) => talk(socket, socket));
  server.listen(Number(option('--listen')), '127.0.0.1', () => console.error(`port ${server.address().port}`));
} else {
  talk(process.stdin, process.stdout); // ends with its input, since nothing else is waited for
}
