// Goal:   what is not permitted is refused by name, without an effect (SE7).
// Method: short stories, each step through drive.ts, which repeats it on the state loaded from its snapshot.
import { describe, expect, test } from "vitest";
import type { TranscriptItem } from "../../state-machines/session-transcript.ts";
import { answer, configuration, expectInvariants, observed, session, type SessionDrive } from "./session-drive.ts";

describe("what is not permitted", () => {
  const denying = (): SessionDrive => {
    const drive = session();
    drive.done("configuration", { ...configuration({ tools: ["now"] }), denied_tools: ["pay"] });
    drive.send();
    return drive;
  };

  test("SE7: a denied tool is refused by name, without an effect, in the commit of the answer that called it", () => {
    const drive = denying();
    drive.done("model", answer("", "pay", "now"));
    expect(drive.told.filter(({ type }) => type.startsWith("tool."))).toMatchObject([
      { type: "tool.denied", name: "pay", code: "denied", message: "the tool 'pay' is not permitted here" },
      { type: "tool.started", name: "now" },
    ]);
    expect(drive.running).toEqual(["tool.1"]);
    drive.done("tool.1", observed);
    expect((drive.prompt as TranscriptItem[]).at(-2)).toMatchObject({ role: "tool", name: "pay", failed: { code: "denied" } });
    expectInvariants(drive);
  });

  test("a tool that is denied when it is to run is told as denied too", () => {
    const drive = denying();
    drive.done("model", answer("", "now")).fail("tool.0", { code: "denied", message: "tool:now is denied by the rule 'tool:*'" });
    expect(drive.told[0]).toMatchObject({ type: "tool.denied", name: "now", message: "tool:now is denied by the rule 'tool:*'" });
    expectInvariants(drive);
  });
});
