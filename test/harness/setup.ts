// setup: runs before each test file. Whatever the file starts through the harness ends with it.
import { afterAll } from "vitest";
import { endAll } from "./endings.ts";

afterAll(endAll);
