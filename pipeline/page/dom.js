// What every part of the page needs: its elements, the size of the screen, and answers of the server.
export const $ = (id) => document.getElementById(id);
export const small = matchMedia("(max-width: 700px), (max-height: 460px)");
export const escape = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

export async function ask(address) {
  let answer;
  try {
    answer = await fetch(address);
  } catch {
    throw new Error("The server does not answer any more. Start it again with cloudgate view.");
  }
  const data = await answer.json();
  if (!answer.ok) throw new Error(data.error ?? answer.statusText);
  return data;
}

export function options(select, entries, value) {
  select.innerHTML = "";
  for (const [key, title] of entries) select.add(new Option(title, key));
  if (value !== undefined && entries.some(([key]) => key === String(value))) select.value = value;
}
