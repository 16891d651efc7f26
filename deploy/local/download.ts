// download: one file over HTTP or HTTPS, with an end to every wait. Honours HTTPS_PROXY, HTTP_PROXY and NO_PROXY.
import http from "node:http";
import https from "node:https";

/** A host that does not take a connection in this time is not reachable; the next way is tried. */
const CONNECT_PATIENCE_MS = 5_000;
/** A transfer that stands still this long is dead. */
const STALL_PATIENCE_MS = 20_000;
const REDIRECTS_MAX = 5;

export type Download = { readonly kind: "done"; readonly data: Buffer } | { readonly kind: "failed"; readonly reason: string };

/** Limits: refuses more than `bytes_max`; 5 s to connect, 20 s of standing still, 5 redirects. Never from https to http. */
export async function download(address: string, options: { bytes_max: number; env: NodeJS.ProcessEnv }): Promise<Download> {
  let url = new URL(address);
  for (let hop = 0; hop <= REDIRECTS_MAX; hop++) {
    const answer = await get(url, options);
    if (answer.kind !== "redirect") return answer;
    const next = new URL(answer.location, url);
    if (url.protocol === "https:" && next.protocol !== "https:") return { kind: "failed", reason: `${url.host} redirects to an unencrypted address` };
    url = next;
  }
  return { kind: "failed", reason: `${new URL(address).host} redirects for ever` };
}

type Answer = Download | { readonly kind: "redirect"; readonly location: string };

function get(url: URL, options: Parameters<typeof download>[1]): Promise<Answer> {
  return new Promise((resolve) => {
    const failed = (reason: string): void => resolve({ kind: "failed", reason: `${url.host}: ${reason}` });
    const secure = url.protocol === "https:";
    const proxies = { proxyEnv: options.env };
    const agent = secure ? new https.Agent(proxies) : new http.Agent(proxies);
    const request = (secure ? https : http).get(url, { agent, headers: { "user-agent": "troupe", accept: "*/*" } });
    const connecting = setTimeout(() => request.destroy(new Error(`no connection within ${CONNECT_PATIENCE_MS / 1000} s`)), CONNECT_PATIENCE_MS);
    request.once("socket", (socket) => socket.once(secure ? "secureConnect" : "connect", () => clearTimeout(connecting)));
    request.setTimeout(STALL_PATIENCE_MS, () => request.destroy(new Error(`nothing came for ${STALL_PATIENCE_MS / 1000} s`)));
    request.once("error", (error) => failed((error as NodeJS.ErrnoException).code === undefined ? error.message : `${(error as NodeJS.ErrnoException).code}`));
    request.once("close", () => {
      clearTimeout(connecting);
      agent.destroy();
    });
    request.once("response", (response) => {
      clearTimeout(connecting);
      const status = response.statusCode ?? 0;
      if (status >= 300 && status < 400 && response.headers.location !== undefined) {
        response.resume();
        resolve({ kind: "redirect", location: response.headers.location });
        return;
      }
      if (status !== 200) {
        response.resume();
        failed(`answers ${status}`);
        return;
      }
      const chunks: Buffer[] = [];
      let bytes = 0;
      response.on("data", (chunk: Buffer) => {
        bytes += chunk.length;
        chunks.push(chunk);
        if (bytes <= options.bytes_max) return;
        failed(`sends more than ${options.bytes_max} bytes`);
        request.destroy();
      });
      response.once("error", (error) => failed(error.message));
      response.once("end", () => (response.complete ? resolve({ kind: "done", data: Buffer.concat(chunks) }) : failed("the transfer was cut off")));
    });
  });
}
