// undecided-rates: may a call of a model go on though its tenant's budget, which holds the windows of the rates, cannot be asked? (AR-F77)
//
//   TROUPE_RATES_UNDECIDED   closed    no: it waits as long as a budget is waited for, and is refused as `unavailable` (the default)
//                            own_keys  only with the tenant's own key at that provider: the window that it may overrun is the tenant's own
//                            open      with any key
//
// Money is never let through: a call whose cost is not held yet goes on only where the budget's journal says that no limit of money or of calls at once
// applies to the tenant. Its reservation is stored meanwhile, before its settlement, so the budget counts both as soon as it can be asked again.
//
// Invariants:
//   UR1. Nothing goes on that a limit of money, of calls at once or of an agent's own actions could have refused.
//   UR2. Not knowing whose key it is, or whether a limit applies, is a no.
import { errorFields, type Log } from "../protocol/log.ts";
import type { BudgetStanding } from "./budget-standing.ts";
import type { TenantModels } from "./tenant-models.ts";

export const UNDECIDED_MODES = ["closed", "own_keys", "open"] as const;
export type UndecidedMode = (typeof UNDECIDED_MODES)[number];

export interface UndecidedRates {
  /** `held`: the call's cost is held already, and only its place in a window is asked for. */
  mayGoOn(tenant: string, model: string, what: "held" | "all"): Promise<boolean>;
  /** It did. */
  wentOn(tenant: string, model: string): void;
}

export interface UndecidedRatesDeps {
  readonly mode: UndecidedMode;
  readonly models: Pick<TenantModels, "of">;
  readonly standing: Pick<BudgetStanding, "is_unlimited">;
  readonly log: Log;
  on_went_on?(provider: string): void;
}

export function createUndecidedRates({ mode, models, standing, log, on_went_on }: UndecidedRatesDeps): UndecidedRates {
  return {
    async mayGoOn(tenant, model, what) {
      if (mode === "closed") return false;
      try {
        if (mode === "own_keys") {
          const resolved = await models.of(tenant).resolve(model);
          if (resolved.kind === "refused" || resolved.key_source !== "tenant") return false;
        }
        return what === "held" || (await standing.is_unlimited(tenant));
      } catch (error) {
        log.debug("a budget's journal cannot be read either; its rate stays closed", { tenant, ...errorFields(error) }); // UR2
        return false;
      }
    },
    wentOn(tenant, model) {
      log.warn("a rate could not be decided, and the call went on as TROUPE_RATES_UNDECIDED says", { tenant, model, mode });
      on_went_on?.(model.slice(0, Math.max(0, model.indexOf("/"))));
    },
  };
}
