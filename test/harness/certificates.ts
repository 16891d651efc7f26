// certificates: an authority of one's own and certificates of it, made here and nowhere else: X.509 v3 in DER, put together by hand, since Node reads
// certificates and makes none.
import { generateKeyPairSync, type KeyObject, randomBytes, sign } from "node:crypto";
import { writeFileSync } from "node:fs";
import { join } from "node:path";

export interface CertificateFiles {
  readonly cert_file: string;
  readonly key_file: string;
}
export interface Authority {
  readonly ca_file: string;
  /** A certificate of `localhost` and 127.0.0.1, for either end of a connection. */
  issue(name: string, valid_s?: number): CertificateFiles;
}

const der = (tag: number, ...parts: readonly Uint8Array[]): Buffer => {
  const content = Buffer.concat(parts);
  const { length } = content;
  const size = length < 128 ? [length] : length < 256 ? [0x81, length] : [0x82, length >> 8, length & 255];
  return Buffer.concat([Buffer.from([tag, ...size]), content]);
};
const sequence = (...parts: readonly Uint8Array[]): Buffer => der(0x30, ...parts);
const oid = (...bytes: readonly number[]): Buffer => der(0x06, Buffer.from(bytes));
const bits = (bytes: Uint8Array): Buffer => der(0x03, Buffer.from([0]), bytes);
const octets = (bytes: Uint8Array): Buffer => der(0x04, bytes);
const yes = der(0x01, Buffer.from([255]));

const ECDSA_WITH_SHA256 = sequence(oid(0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02));
const nameOf = (common: string): Buffer => sequence(der(0x31, sequence(oid(0x55, 0x04, 0x03), der(0x0c, Buffer.from(common)))));
const timeOf = (ms: number): Buffer => der(0x18, Buffer.from(new Date(ms).toISOString().replace(/[-:T]|\.\d+/g, "")));
const extension = (id: Buffer, critical: boolean, value: Buffer): Buffer => sequence(id, ...(critical ? [yes] : []), octets(value));
const BASIC_CONSTRAINTS = oid(0x55, 0x1d, 0x13);
const ALTERNATIVE_NAMES = oid(0x55, 0x1d, 0x11);

function certificate(of: { subject: string; issuer: string; key: KeyObject; signer: KeyObject; valid_s: number; extensions: readonly Buffer[] }): string {
  const body = sequence(
    der(0xa0, der(0x02, Buffer.from([2]))),
    der(0x02, Buffer.concat([Buffer.from([1]), randomBytes(8)])),
    ECDSA_WITH_SHA256,
    nameOf(of.issuer),
    sequence(timeOf(Date.now() - 3_600_000), timeOf(Date.now() + of.valid_s * 1000)),
    nameOf(of.subject),
    of.key.export({ type: "spki", format: "der" }),
    der(0xa3, sequence(...of.extensions)),
  );
  const text = sequence(body, ECDSA_WITH_SHA256, bits(sign("sha256", body, of.signer))).toString("base64");
  return `-----BEGIN CERTIFICATE-----\n${text.replace(/.{1,64}/g, "$&\n")}-----END CERTIFICATE-----\n`;
}

/** Files in `folder`. */
export function createAuthority(folder: string, name: string): Authority {
  const own = generateKeyPairSync("ec", { namedCurve: "P-256" });
  const ca_file = join(folder, `${name}.pem`);
  const extensions = [extension(BASIC_CONSTRAINTS, true, sequence(yes))];
  writeFileSync(ca_file, certificate({ subject: name, issuer: name, key: own.publicKey, signer: own.privateKey, valid_s: 3_600, extensions }));
  return {
    ca_file,
    issue(subject, valid_s = 3_600) {
      const { publicKey, privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
      const names = sequence(der(0x82, Buffer.from("localhost")), der(0x87, Buffer.from([127, 0, 0, 1])));
      const issued = { subject, issuer: name, key: publicKey, signer: own.privateKey, valid_s, extensions: [extension(ALTERNATIVE_NAMES, false, names)] };
      const files = { cert_file: join(folder, `${name}-${subject}.pem`), key_file: join(folder, `${name}-${subject}.key`) };
      writeFileSync(files.cert_file, certificate(issued));
      writeFileSync(files.key_file, privateKey.export({ type: "pkcs8", format: "pem" }), { mode: 0o600 });
      return files;
    },
  };
}
