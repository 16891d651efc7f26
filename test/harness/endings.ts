// endings: what a test file started and must end. setup.ts calls them when the file is through, newest first.
type Ending = () => Promise<void>;

const endings: Ending[] = [];

export function atEndOfFile(ending: Ending): void {
  endings.push(ending);
}

export async function endAll(): Promise<void> {
  for (let ending = endings.pop(); ending !== undefined; ending = endings.pop()) await ending();
}
