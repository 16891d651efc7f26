// setup-fault: something the machine must have is not there. The message is for the person at the terminal: what is missing, and
// exactly what to type. main.ts prints it without a stack and exits 3.
export class SetupFault extends Error {
  override readonly name = "SetupFault";
}
