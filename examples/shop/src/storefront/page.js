// Shows what the services say, once a second, and places orders. Every text from outside is set as text.
'use strict';

const byId = (id) => document.getElementById(id);
const euros = (cents) => `${(cents / 100).toFixed(2)} €`;
const names = new Map();
const shelves = new Map();
const rows = new Map();

// An answer's JSON; an error says what the shop said, in words.
async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error('the storefront cannot be reached');
  }
  const body = await response.json().catch(() => null);
  if (response.ok && body !== null) return body;
  throw new Error(body?.detail ?? `the storefront answered ${response.status}`);
}

function picture(element, product) {
  const known = document.querySelector(`symbol#${CSS.escape(product)}`) ? product : 'thing';
  element.querySelector('use').setAttribute('href', `#${known}`);
}

function fill(template) {
  return byId(template).content.firstElementChild.cloneNode(true);
}

function showStock(goods) {
  for (const good of goods) {
    names.set(good.id, good.name);
    let card = shelves.get(good.id);
    if (!card) {
      card = fill('good');
      picture(card, good.id);
      card.addEventListener('submit', (event) => {
        event.preventDefault();
        order(card, good.id);
      });
      shelves.set(good.id, card);
      byId('goods').append(card);
    }
    card.querySelector('h3').textContent = good.name;
    card.querySelector('.price').textContent = euros(good.price_cents);
    card.querySelector('meter').value = good.stock;
    card.querySelector('.stock').textContent = `${good.stock} in stock`;
  }
}

function showOrders(orders) {
  const first = rows.size === 0;
  const shown = new Set(orders.map((order) => order.id));
  for (const [id, row] of rows) {
    if (!shown.has(id)) {
      row.remove();
      rows.delete(id);
    }
  }
  orders.forEach((order, position) => {
    let row = rows.get(order.id);
    if (!row) {
      row = fill('order');
      picture(row, order.product);
      if (!first) row.classList.add('new');
      rows.set(order.id, row);
    }
    const list = byId('orders');
    if (list.children[position] !== row) list.insertBefore(row, list.children[position] ?? null);
    showOrder(row, order);
  });
  byId('no-orders').hidden = orders.length > 0;
}

function showOrder(row, order) {
  const state = order.problem && order.state === 'received' ? 'failed' : order.state;
  row.classList.remove('received', 'paid', 'placed', 'fulfilled', 'failed');
  row.classList.add(state);
  row.querySelector('b').textContent = `${order.quantity} × ${names.get(order.product) ?? order.product}`;
  const time = new Date(order.at_ms).toLocaleTimeString([], { hour12: false });
  row.querySelector('.what span').textContent = order.problem ?? `${euros(order.total_cents)}, ${time}`;
  row.title = `order ${order.id}${order.problem ? `: ${order.problem}` : ''}`;
  row.querySelector('.state').textContent = state;
}

function showTotals(totals) {
  for (const name of ['placed', 'fulfilled', 'failed']) {
    byId(name).textContent = totals[name]?.toLocaleString('en') ?? '–';
  }
  byId('failed').parentElement.classList.toggle('some', totals.failed > 0);
  if (totals.problems.length > 0) throw new Error(totals.problems.join('; '));
}

async function order(card, product) {
  const button = card.querySelector('button');
  const quantity = Number(card.elements.quantity.value);
  button.disabled = true;
  try {
    const placed = await ask('api/orders', {
      method: 'POST',
      headers: { 'content-type': 'application/json', 'idempotency-key': freshKey() },
      body: JSON.stringify({ product, quantity }),
    });
    toast(`Thank you! ${quantity} × ${names.get(product)} for ${euros(placed.total_cents)}.`);
  } catch (error) {
    toast(`The order did not go through. ${error.message}`, true);
  }
  button.disabled = false;
  await refresh();
}

// crypto.randomUUID is missing where the page is not on localhost or HTTPS.
function freshKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, '$1-$2-$3-$4-');
}

let hideToast;
function toast(text, bad = false) {
  const box = byId('toast');
  box.textContent = text;
  box.classList.toggle('bad', bad);
  box.hidden = false;
  clearTimeout(hideToast);
  hideToast = setTimeout(() => { box.hidden = true; }, bad ? 9000 : 4000);
}

// Each part is shown as soon as it is there; one service that is away does not hide the others.
async function refresh() {
  const parts = [['api/stock', showStock], ['api/orders', showOrders], ['api/summary', showTotals]];
  const results = await Promise.allSettled(parts.map(async ([path, show]) => show(await ask(path))));
  const troubles = new Set(results.flatMap(({ reason }) => reason?.message ?? []));
  byId('trouble').textContent = [...troubles].join(' · ');
  byId('trouble').hidden = troubles.size === 0;
}

async function poll() {
  if (!document.hidden) await refresh();
  setTimeout(poll, 1000);
}
poll();
